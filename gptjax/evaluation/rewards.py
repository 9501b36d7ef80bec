"""How well sampled responses are rewarded."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RewardScores:
    """What reinforcement is judged by; the names are those of `metrics.jsonl`."""

    reward: float
    """Mean reward of the most likely response to each validation prompt."""

    @property
    def val_loss(self) -> float:
        """The reward with its sign turned, so that lower is better."""
        return -self.reward

    def row(self) -> dict[str, float]:
        """What there is, for `metrics.jsonl`."""
        return {"val_loss": self.val_loss, "val_reward": self.reward}

    def __str__(self) -> str:
        return f"reward {self.reward:.4f}"
