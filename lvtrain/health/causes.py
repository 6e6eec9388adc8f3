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
    """A named cause, and its line. What is no fault, such as a plateau, is not a warning."""

    cause: str
    text: str
    is_warning: bool = True


CAUSES: dict[str, Cause] = {
    "scale": Cause(
        "a scale of {scale:g} is too small for {least:.0f} or more that this number of identities needs",
        "set classifier.margin.scale (published runs: 64)",
    ),
    "rate high": Cause(
        "the learning rate is too high: {rate:.2g}, usual is {usual}", "lower optimizer.lr; is lr_for_batch right?"
    ),
    "rate low": Cause(
        "the learning rate is too low: {rate:.2g}, usual is {usual}", "raise optimizer.lr; is lr_for_batch right?"
    ),
    "warm-up": Cause(
        "there is no warm-up, and a transformer at a rate of {rate:.2g} may never leave its first plateau",
        "set schedule.warmup, such as 3 epochs",
    ),
    "decay": Cause(
        "weight decay {decay:.3g} makes weights forget what they learned within {steps:.0f} steps",
        "lower optimizer.weight_decay (published: 0.1 with AdamW, 5e-4 with SGD)",
    ),
    "ema": Cause(
        "the averaged weights are evaluated in step {step:.0f}, when {share:.0%} of them are still the first weights",
        "lower ema.decay, or evaluate later",
    ),
    "sampling": Cause(
        "a sample rate of {rate:g} leaves {classes:.0f} classes in a step whose batch has {positives:.0f} identities",
        "raise phases.*.sample_rate (published: 0.1 of 360,000 and more)",
    ),
    "classes": Cause(
        "{empty:,} of {classes:,} identities have no image",
        "was the number of identities counted right? pack the dataset again",
    ),
    "normalisation": Cause(
        "pixels lie between {low:.2g} and {high:.3g}, not between -1 and 1",
        "does something between the loader and the network skip (x - 127.5) / 127.5?",
    ),
    "bgr": Cause(
        "red and blue are exchanged {where}",
        "look at the contact sheet (tools/verify_dataset.py --sheet); pack with the right channel order",
    ),
    "constant": Cause(
        "{share:.0%} of the images are one colour", "look at the images that events.jsonl and the contact sheet show"
    ),
    "colourless": Cause(
        "{share:.0%} of the images have no colour, and the others have",
        "are there grey images among the files, or does the augmentation take the colour?",
    ),
    "copies": Cause(
        "{share:.0%} of the images in a batch are the same image under several numbers",
        "look at the files for copies (tools/clean_dataset.py), and at the decoder",
    ),
    "duplicates": Cause(
        "{share:.1%} of the image files are in several identities",
        "which identities share files? tools/clean_dataset.py finds them",
    ),
    "part": Cause(
        "rank {rank} is served other images than its part of the order ({share:.0%} of them)",
        "is each rank started with its own RANK? do all ranks read the same dataset?",
    ),
    "labels": Cause(
        "labels do not belong to the images: two images of one identity are no more alike than two of different ones",
        "were labels shuffled, or shifted by a shard or a line? compare some (tools/verify_dataset.py --sheet)",
    ),
    "split": Cause(
        "identities seem to be split over several labels: {share:.0%} of the class centres have a twin",
        "look for identities with two names (tools/clean_dataset.py)",
    ),
    "merged": Cause(
        "labels seem to hold several identities each: {share:.0%} of those looked at fall into two groups",
        "look at the images of a label together (tools/clean_dataset.py)",
    ),
    "augmentation": Cause(
        "augmented images have lost their content (likeness to the files {likeness:.2f}, contrast {contrast:.2f})",
        "lower the strength of data.augmentation; look at what the network sees",
    ),
    "gradient": Cause(
        "the backbone's gradient is {factor:.2g} times too large",
        "is it multiplied by the number of ranks, or summed instead of averaged? or is the scale larger than the recipe's?",
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
        "class centres are becoming one direction: images are as near to other centres as to their own ({cosine:.2f})",
        "take CosFace, warm the margin up (classifier.margin.warmup), or lower optimizer.lr",
    ),
    "plateau": Cause(
        "plateau: all images are nearly one direction (batch_cosine {across:.2f}, cos2 {cos2:.3f}), as in every large "
        "network at first",
        "published ViTs left it after 28 to 39 million images, at a fifth of the peak rate; wait",
    ),
    "not learning": Cause(
        "not learning: after {epoch:.1f} epochs cos2 is {cos2:.4f} and batch_cosine {across:.2f}, and the loss has not "
        "fallen since the warm-up",
        "check the labels (tools/verify_dataset.py), lower optimizer.lr, lengthen schedule.warmup, or warm the margin up "
        "(classifier.margin.warmup)",
    ),
    "rows": Cause(
        "{share:.0%} of the class centres do not move, though their classes take part",
        "does the optimizer of the classifier get their gradient? is its learning rate 0?",
    ),
}


def finding(cause: str, *, is_warning: bool = True, **values: Any) -> Finding:
    """The finding with its line: what is wrong, and what to look at."""
    known = CAUSES[cause]
    return Finding(cause, f"{known.text.format(**values)}; {known.look}", is_warning)
