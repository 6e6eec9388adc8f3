"""The named sets of views, and what they are made of."""

from __future__ import annotations

from lvtrain.data.augment.operations import (
    Blur,
    Crop,
    Down,
    Erase,
    Flip,
    Grey,
    Jitter,
    RandAugment,
    Range,
    Solarise,
    View,
)
from lvtrain.data.augment.step_draws import JitterSteps, RandSteps, blur_step, grey_step, solarise_step
from lvtrain.recipe.registry import AUGMENTATIONS

_DINO_JITTER = Jitter(0.8, 0.4, 0.4, 0.2, 0.1)
# for the small recipes' 56 pixels and generated faces, whose light and exposure identify an image more than in photographs
_SMALL_JITTER = Jitter(0.9, 0.6, 0.6, 0.4, 0.1)
# for generated faces of difficulty `album`, which an identity's colours tell apart
_ALBUM_JITTER = Jitter(0.8, 0.4, 0.4, 0.2, 0.05)


def _dino(
    local_scale: Range,
    local_size: int | None,
    jitter: Jitter = _DINO_JITTER,
    radius: Range = (0.1, 2.0),
    local_views: int = 8,
) -> tuple[View, ...]:
    """DINO's views (Caron et al., 2021): two global ones (one always blurred, one sometimes solarised) and eight local ones."""
    whole, colour = Crop((0.4, 1.0)), (Flip(), jitter, Grey(0.2))
    return (
        View("global_0", (whole, *colour, Blur(1.0, radius))),
        View("global_1", (whole, *colour, Blur(0.1, radius), Solarise(0.2))),
        *(View(f"local_{i}", (Crop(local_scale), *colour, Blur(0.5, radius)), local_size) for i in range(local_views)),
    )


def with_clean_twin(views: tuple[View, ...]) -> tuple[View, ...]:
    """The views, and beside `image` a view `clean`: the same crop and flip and nothing else.

    It has no draws of its own, so `image` is the same with and without it.
    """
    (image,) = (view for view in views if view.name == "image")
    return *views, _twin(image, "clean")


def _twin(view: View, name: str) -> View:
    return View(name, tuple(op for op in view.ops if isinstance(op, Crop | Flip)), view.size, view.name)


def _with_landmark_twins(views: tuple[View, ...]) -> tuple[View, ...]:
    """Adds to each view a `NAME_landmarks` with the same crop and flip and nothing else, for LAFS's landmark CNN."""
    return views + tuple(_twin(view, f"{view.name}_landmarks") for view in views)


def _dino_released(local_scale: Range, local_size: int | None) -> tuple[View, ...]:
    """DINO's views as its code draws them, and LAFS's: crops drawn again, bicubic, jitter in random order, solarise last."""
    jitter, sigma = JitterSteps(0.8, 0.4, 0.4, 0.2, 0.1), (0.1, 2.0)
    whole, colour = Crop((0.4, 1.0), tries=10, cubic=True), (Flip(), jitter, grey_step(0.2))
    local = Crop(local_scale, tries=10, cubic=True)
    return (
        View("global_0", (whole, *colour, blur_step(1.0, sigma))),
        View("global_1", (whole, *colour, blur_step(0.1, sigma), solarise_step(0.2))),
        *(View(f"local_{i}", (local, *colour, blur_step(0.5, sigma)), local_size) for i in range(8)),
    )


def _lafs_finetune(magnitude: float) -> tuple[View, ...]:
    """The released code's views for fine-tuning. Our reading: the crop comes before RandAugment, there after it."""
    crop, erase = Crop((0.9, 1.0), tries=10), Erase(0.5, (0.02, 0.1), black=True)
    return (View("image", (crop, Flip(), RandSteps(magnitude), JitterSteps(1.0, 0.1, 0.1, 0.1, 0.1), erase)),)


_RAND_AUGMENT = (Flip(), RandAugment(2, 9.0), Erase(0.25, (0.02, 0.2)))

SETS: dict[str, tuple[View, ...]] = {
    # nothing, and the flip that every face trainer uses
    "none": (View("image"),),
    "flip": (View("image", (Flip(),)),),
    # the kinds of arcface_torch's optional DALI augmentation: some faces are small, blurred, tinted or grey
    "arcface": (
        View(
            "image",
            (Flip(), Jitter(0.1, 0.3, 0.3, 0.3, 0.05), Grey(0.1), Down(0.1, (0.25, 0.9)), Blur(0.1, (0.2, 1.5))),
        ),
    ),
    "strong": (
        View(
            "image",
            (
                Crop((0.7, 1.0)),
                Flip(),
                Jitter(0.5, 0.4, 0.4, 0.4, 0.05),
                Grey(0.1),
                Down(0.2, (0.2, 0.9)),
                Blur(0.2, (0.2, 2.0)),
                Erase(0.25, (0.02, 0.2)),
            ),
        ),
    ),
    # small and blurred faces, for a student of a teacher that sees the clean image (method.distill.view)
    "degraded": (View("image", (Flip(), Down(0.8, (0.15, 0.9)), Blur(0.5, (0.2, 2.0)))),),
    # a strong one for fine-tuning
    "randaugment": (View("image", _RAND_AUGMENT),),
    # LAFS fine-tuning as its released code draws it: magnitude 1 of 10 on WebFace4M, 2 on MS1MV3
    "lafs_finetune": _lafs_finetune(1.0),
    "lafs_finetune_ms1mv3": _lafs_finetune(2.0),
    # self-supervision. Local crops: [0.05, 0.4] is the default of DINO's own code (--local_crops_scale), [0.08, 0.4] what LAFS says it starts
    # from (supplement 8.1.3); 48 pixels of 112 are LAFS's, 24 and half the blur the same share of small recipes' 56
    "dino": _dino((0.05, 0.4), 48),
    "dino_faces": _dino((0.08, 0.4), 48),
    "dino_faces_56": _dino((0.08, 0.4), 24, _SMALL_JITTER, (0.1, 1.0)),
    # for generated faces of difficulty `album`: fewer and larger local crops, which teach more in a few thousand steps
    "dino_album_56": _dino((0.25, 0.6), 32, _ALBUM_JITTER, (0.1, 1.0), local_views=4),
    # LAFS crops its student views as the global ones, [0.4, 1.0] (section 3.2 and supplement 8.1.3), at full size
    "lafs": _with_landmark_twins(_dino((0.4, 1.0), None)),
    "lafs_56": _with_landmark_twins(_dino((0.4, 1.0), None, _SMALL_JITTER, (0.1, 1.0))),
    # the same as the released code draws them (the sets above are those of runs begun before)
    "dino_released": _dino_released((0.05, 0.4), 48),
    "dino_faces_released": _dino_released((0.08, 0.4), 48),
    "lafs_released": _with_landmark_twins(_dino_released((0.4, 1.0), None)),
    "lafs_album_56": _with_landmark_twins(_dino((0.4, 1.0), None, _ALBUM_JITTER, (0.1, 1.0), local_views=4)),
}

for _name, _views in SETS.items():
    AUGMENTATIONS.register(_name)(_views)


def augmentation(name: str) -> tuple[View, ...]:
    """The views of a named set.

    Raises:
        UserError: no such set; the known ones are listed.
    """
    views: tuple[View, ...] = AUGMENTATIONS.get(name)
    return views
