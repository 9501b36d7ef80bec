"""Classification heads ⇄ `…ForSequenceClassification` and `…ForTokenClassification` of Hugging Face."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.exchange.families.family import Family

CLASSES = {"classify": "ForSequenceClassification", "tag": "ForTokenClassification"}
"""Suffix of the class name in transformers, by `task.kind`."""


@dataclasses.dataclass(frozen=True)
class LabelHead:
    """A head of a run."""

    task: TaskConfig
    w_ND: np.ndarray
    bias_N: np.ndarray


def head_kind(raw: dict) -> str:
    """The kind of task of a config.json's head; empty for a language model."""
    names = raw.get("architectures") or [""]
    return next((kind for kind, name in CLASSES.items() if str(names[0]).endswith(name)), "")


def head_name(family: Family, kind: str) -> str:
    """The name of a head's tensors, without ".weight"."""
    return family.tag_head if kind == "tag" else "score"


def head_config(family: Family, task: TaskConfig, pad_token: int | None) -> dict:
    """The fields of config.json that describe a head."""
    stem = re.sub("(ForCausalLM|LMHeadModel)$", "", family.architecture)
    problem = "multi_label_classification" if task.multi_label else "single_label_classification"
    return {
        "architectures": [stem + CLASSES[task.kind]],
        "id2label": {str(i): label for i, label in enumerate(task.labels)},
        "label2id": {label: i for i, label in enumerate(task.labels)},
        "problem_type": problem if task.kind == "classify" else None,
        "pad_token_id": pad_token,
    }


def read_task(raw: dict, kind: str, count: int) -> TaskConfig:
    """The task of an imported head with `count` labels. Labels without names are called LABEL_0 and so on, as in
    transformers.
    """
    names = raw.get("id2label") or {}
    labels = tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(count))
    if kind == "tag":
        return TaskConfig(kind="tag", labels=labels)
    several = raw.get("problem_type") == "multi_label_classification"
    return TaskConfig(kind="classify", labels=labels, multi_label=several, pooling="last")


def read_head(tensors: dict[str, np.ndarray], name: str, model: ModelConfig, where: str) -> dict:
    """Converts tensors to our head.

    Raises:
        UserError: A tensor is missing or has the wrong shape.
    """
    w_ND = tensors.get(f"{name}.weight")
    if w_ND is None:
        raise UserError(f"{where}: tensor {name}.weight is missing")
    if w_ND.ndim != 2 or w_ND.shape[1] != model.n_embd:
        raise UserError(f"{where}: tensor {name}.weight has shape {list(w_ND.shape)}, must be [labels, {model.n_embd}]")
    bias_N = tensors.get(f"{name}.bias", np.zeros(len(w_ND), np.float32))
    if bias_N.shape != w_ND.shape[:1]:
        raise UserError(f"{where}: tensor {name}.bias has shape {list(bias_N.shape)}, must be [{len(w_ND)}]")
    return {"w": jnp.asarray(w_ND.astype(np.float32)), "bias": jnp.asarray(bias_N.astype(np.float32))}


def label_head(task: TaskConfig, head: dict, where: str) -> LabelHead:
    """The head of a run, if a class of transformers computes the same.

    Raises:
        UserError: No class does; the message says what to change.
    """
    for option in ("bag_of_words", "layer_mixture"):
        if value := getattr(task, option):
            raise UserError(f"{where}: transformers has no head with task.{option}={value}; train without")
    if task.kind not in CLASSES or head.keys() != {"w", "bias"}:
        raise UserError(f"{where}: head needs task.kind=classify or tag, this run has task.kind={task.kind}")
    if task.kind == "classify" and task.pooling != "last":
        raise UserError(f"{where}: transformers reads the last token of a text; train with task.pooling=last, not mean")
    if task.kind == "tag" and task.lookahead:
        raise UserError(f"{where}: transformers labels a word at its own tokens; train with task.lookahead=0")
    return LabelHead(task, np.asarray(head["w"]).astype(np.float32), np.asarray(head["bias"]).astype(np.float32))


def head_tensors(family: Family, head: LabelHead, params: dict) -> tuple[dict[str, np.ndarray], dict]:
    """The head's tensors, and the parameters of the model below it.

    Hugging Face's heads for whole texts have no bias. If the final norm has a bias, the head's bias is folded into it.

    Raises:
        UserError: The bias cannot be folded into a norm.
    """
    name = head_name(family, head.task.kind)
    if head.task.kind == "tag":
        return {f"{name}.weight": head.w_ND, f"{name}.bias": head.bias_N}, params
    if head.bias_N.any():
        norm = params.get("norm_f", {})
        w_ND, bias_N = head.w_ND.astype(np.float64), head.bias_N.astype(np.float64)
        shift_D = np.linalg.pinv(w_ND) @ bias_N
        if "bias" not in norm or not np.allclose(w_ND @ shift_D, bias_N, rtol=0, atol=1e-6 * np.abs(bias_N).max()):
            raise UserError(
                f"the head has a bias (up to {np.abs(bias_N).max():.3g}), for which a {family.model_type} with"
                f" {CLASSES['classify']} has no place; export it without head"
            )
        bias_D = (np.asarray(norm["bias"]).astype(np.float64) + shift_D).astype(np.float32)
        params = params | {"norm_f": norm | {"bias": jnp.asarray(bias_D)}}
    return {f"{name}.weight": head.w_ND}, params
