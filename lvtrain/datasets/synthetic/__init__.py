"""Generated identities: cartoon faces that are a real verification problem, from a seed alone.

`faces` draws the numbers (who a person is, how one picture differs), `render` draws the picture, `dataset` writes shards, index and pairs.
"""

from lvtrain.datasets.synthetic.dataset import FacesWritten, heldout_pairs, write_faces
from lvtrain.datasets.synthetic.faces import DIFFICULTIES, Difficulty
from lvtrain.datasets.synthetic.render import render_face

__all__ = ["DIFFICULTIES", "Difficulty", "FacesWritten", "heldout_pairs", "render_face", "write_faces"]
