"""What is done about each kind of problem: keep the image (or identity), skip it, fix it, or fail."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lvtrain.errors import UserError

# kind: (what it is, policies that make sense)
POLICIES = {
    "wrong_size": ("an image of another size; fix resizes and encodes it again", ("keep", "skip", "fix", "fail")),
    "not_square": (
        "an image that is not square, so not an aligned face; only with --wrong-size fix, and fix distorts it",
        ("skip", "fix", "fail"),
    ),
    "undecodable": ("an image that cannot be decoded; if kept, training ignores it", ("keep", "skip", "fail")),
    "grey": ("an image without colour; fix writes three equal channels", ("keep", "skip", "fix", "fail")),
    "empty_identity": (
        "an identity without an image; if kept, it is a class without samples",
        ("keep", "skip", "fail"),
    ),
    "duplicate": ("the same bytes as an earlier image; skip keeps the first", ("keep", "skip", "fail")),
    "label_gap": (
        "label numbers without an identity; fix renumbers the identities, keep makes classes of the gaps",
        ("keep", "fix", "fail"),
    ),
    "unlabelled": ("an image without a label (missing, empty, null, NaN, -1)", ("fail", "skip")),
    "mismatch": (
        "a source whose content differs from its header, index or manifest; keep packs what exists",
        ("fail", "keep"),
    ),
    "no_face": ("with --align: a photograph in which no face was found", ("skip", "fail")),
}
_BETTER = {"not_square": "an aligned face is square: add --align, which finds, aligns and crops the faces"}


@dataclass(frozen=True)
class Policies:
    """The policy for each kind of problem; see `POLICIES`.

    Raises:
        UserError: a policy that does not exist.
    """

    wrong_size: str = "fix"
    not_square: str = "fail"
    undecodable: str = "skip"
    grey: str = "keep"
    empty_identity: str = "skip"
    duplicate: str = "keep"
    label_gap: str = "fix"
    no_face: str = "skip"
    unlabelled: str = "fail"
    mismatch: str = "fail"

    def __post_init__(self) -> None:
        for kind, policy in asdict(self).items():
            allowed = POLICIES[kind][1]
            if policy not in allowed:
                raise UserError(f"--{kind.replace('_', '-')} {policy} is unknown; choose one of {', '.join(allowed)}")


class Issues:
    """Counts and lists the problems for `pack_report.json`. Counts are exact, lists end at `LISTED` names."""

    LISTED = 10_000

    def __init__(self, policies: Policies) -> None:
        self._policies = asdict(policies)
        self._found: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def policy(self, kind: str) -> str:
        return str(self._policies[kind])

    def overrule(self, kind: str, policy: str) -> None:
        """Sets a policy that follows from that of another kind. `fail` remains."""
        if self.policy(kind) != "fail":
            self._policies[kind] = policy

    def add(self, kind: str, count: int, names: list[str]) -> None:
        """Counts problems of a kind.

        Raises:
            UserError: the policy of this kind is `fail`.
        """
        if not count:
            return
        if self.policy(kind) == "fail":
            others = ", ".join(policy for policy in POLICIES[kind][1] if policy != "fail")
            flag = "--" + kind.replace("_", "-")
            raise UserError(
                f"{kind}: {count} found, the first is {names[0]}; {_BETTER.get(kind, 'fix the source')}, "
                f"or choose {flag} {others}"
            )
        self._counts[kind] = self._counts.get(kind, 0) + count
        self._found.setdefault(kind, []).extend(names[: self.LISTED - len(self._found.get(kind, []))])

    def report(self) -> dict[str, dict[str, object]]:
        return {
            kind: {"policy": policy, "count": self._counts.get(kind, 0), "list": self._found.get(kind, [])}
            for kind, policy in self._policies.items()
        }
