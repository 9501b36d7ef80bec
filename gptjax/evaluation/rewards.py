"""Scores of reinforcement learning."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RewardScores:
    """Scores of an evaluation, with their names in `metrics.jsonl`."""

    reward: float
    """Mean reward of the greedily decoded response to each validation prompt."""

    @property
    def val_loss(self) -> float:
        """The negative reward, so that lower is better."""
        return -self.reward

    def row(self) -> dict[str, float]:
        """The scores for `metrics.jsonl`."""
        return {"val_loss": self.val_loss, "val_reward": self.reward}

    def __str__(self) -> str:
        return f"reward {self.reward:.4f}"
