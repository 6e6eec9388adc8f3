"""The table of causes: what each is, and what to look at. `rules.py` and `start.py` say which signs name it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cause:
    """What is wrong, with the values that `finding` fills in, and what to look at."""

    text: str
    look: str


@dataclass(frozen=True)
class Finding:
    """A named cause, and its line. What is not a fault, such as a plateau, is not a warning."""

    cause: str
    text: str
    is_warning: bool = True


CAUSES: dict[str, Cause] = {
    "scale": Cause(
        "the scale is {scale:g}, and this number of identities needs {least:.0f} or more",
        "set classifier.margin.scale (published runs: 64)",
    ),
    "rate high": Cause(
        "the learning rate is too high: {rate:.2g} ({usual})", "lower optimizer.lr; is optimizer.lr_for_batch right?"
    ),
    "rate low": Cause(
        "the learning rate is too low: {rate:.2g} ({usual})", "raise optimizer.lr; is optimizer.lr_for_batch right?"
    ),
    "warm-up": Cause(
        "there is no warm-up; a transformer at a learning rate of {rate:.2g} may never leave its first plateau",
        "set schedule.warmup, for example to 3 epochs",
    ),
    "decay": Cause(
        "a weight decay of {decay:.3g} erases within {steps:.0f} steps what the weights learned",
        "lower optimizer.weight_decay (published: 0.1 with AdamW, 5e-4 with SGD)",
    ),
    "ema": Cause(
        "at step {step:.0f} the moving average of the weights (ema) is evaluated, but still has {share:.0%} of the "
        "initial weights",
        "lower ema.decay, or evaluate later",
    ),
    "sampling": Cause(
        "a sample rate of {rate:g} takes {classes:.0f} classes into a step, and about {positives:.0f} of them are in the "
        "batch: too few are left as negatives",
        "raise phases.*.sample_rate (published: 0.1 with 360,000 identities or more)",
    ),
    "classes": Cause(
        "{empty:,} of {classes:,} identities have no image", "is the number of identities right? pack the dataset again"
    ),
    "normalisation": Cause(
        "pixels lie between {low:.2g} and {high:.3g}, not between -1 and 1",
        "does something between the loader and the network skip (x - 127.5) / 127.5?",
    ),
    "bgr": Cause(
        "red and blue are exchanged {where}",
        "look at the contact sheet (tools/verify_dataset.py DATASET --sheet sheet.png); pack with the right channel order",
    ),
    "constant": Cause(
        "{share:.0%} of the images are one flat colour",
        "look at the contact sheet (tools/verify_dataset.py DATASET --sheet sheet.png), and at the decoder",
    ),
    "colourless": Cause(
        "{share:.0%} of the images are grey, and the others are in colour",
        "are these files grey? otherwise the augmentation or the decoder removes the colour",
    ),
    "copies": Cause(
        "{share:.0%} of the images are copies: the same image comes under several sample numbers",
        "look for copies among the files (tools/clean_dataset.py), and at the decoder",
    ),
    "duplicates": Cause(
        "{share:.1%} of the image files are in more than one identity", "tools/clean_dataset.py finds them"
    ),
    "part": Cause(
        "rank {rank} gets images that are not its part of the sample order ({share:.0%} of its images)",
        "has each rank its own RANK? do all ranks read the same dataset?",
    ),
    "labels": Cause(
        "labels do not belong to the images: {why}",
        "were labels shuffled, or shifted by a shard or a line? look at the contact sheet (tools/verify_dataset.py DATASET "
        "--sheet sheet.png)",
    ),
    "split": Cause(
        "identities seem to be split over several labels: {share:.0%} of the watched classes have another class centre "
        "nearly as close as their own",
        "look for identities with two names (tools/clean_dataset.py)",
    ),
    "merged": Cause(
        "labels seem to hold several identities each: in {share:.0%} of the watched classes the embeddings form two groups",
        "look at the contact sheet (tools/verify_dataset.py DATASET --sheet sheet.png); tools/clean_dataset.py lists images "
        "far from their identity",
    ),
    "augmentation": Cause(
        "augmented images have lost their content (correlation with their files {likeness:.2f}, contrast {contrast:.2f} of "
        "the files')",
        "choose a milder data.augmentation",
    ),
    "gradient": Cause(
        "the backbone's gradient is {factor:.2g} times too large",
        "is it multiplied by the number of ranks, or summed over them instead of averaged? is the scale larger than the "
        "recipe's?",
    ),
    "frozen": Cause(
        "{share:.0%} of the backbone's weights do not move",
        "are parts frozen (method.frozen, requires_grad), or left out of the optimizer?",
    ),
    "dead": Cause(
        "{share:.0%} of the units of a layer are dead: no image gives them a gradient",
        "lower optimizer.lr or lengthen schedule.warmup; are biases or norms of the loaded weights right?",
    ),
    "collapse": Cause(
        "class centres are becoming one direction: images are as close to other class centres as to their own (cosine "
        "{cosine:.2f})",
        "take CosFace, warm up the margin (classifier.margin.warmup), or lower optimizer.lr",
    ),
    "plateau": Cause(
        "plateau: the embeddings of all images are nearly one direction (batch_cosine {across:.2f}, cos2 {cos2:.3f}); "
        "large networks begin so",
        "wait: published ViTs left it after 28 to 39 million images, in the warm-up, at a fifth of the peak learning rate",
    ),
    "not learning": Cause(
        "not learning: after {epoch:.1f} epochs cos2 is {cos2:.4f} and batch_cosine {across:.2f}, and the loss has not "
        "fallen since the warm-up",
        "check the labels (tools/verify_dataset.py), lower optimizer.lr, lengthen schedule.warmup, or warm up the margin "
        "(classifier.margin.warmup)",
    ),
    "rows": Cause(
        "{share:.0%} of the class centres do not move, although their classes are sampled",
        "does the classifier's optimizer get their gradient? is its learning rate 0?",
    ),
}


def finding(cause: str, *, is_warning: bool = True, **values: Any) -> Finding:
    """The finding with its line: what is wrong, and what to look at."""
    known = CAUSES[cause]
    return Finding(cause, f"{known.text.format(**values)}; {known.look}", is_warning)
