"""Generated identities: drawn faces that make a real verification problem, from a seed only.

`faces` draws the numbers (what an identity looks like, how its images differ), `render` draws the image, and `dataset`
writes shards, index and pairs.
"""

from lvtrain.datasets.synthetic.dataset import GeneratedFaces, heldout_pairs, write_faces
from lvtrain.datasets.synthetic.faces import DIFFICULTIES, Difficulty
from lvtrain.datasets.synthetic.render import render_face

__all__ = ["DIFFICULTIES", "Difficulty", "GeneratedFaces", "heldout_pairs", "render_face", "write_faces"]
