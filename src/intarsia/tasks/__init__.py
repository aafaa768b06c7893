"""Tasks: table columns -> batches -> loss -> predictions -> metrics.  One file per task; see `intarsia.train.task`."""

from intarsia.tasks.align import Align, AlignOptions
from intarsia.tasks.classify import Classify, ClassifyOptions
from intarsia.tasks.clm import Causal, CausalOptions
from intarsia.tasks.common import BaseTask, Options
from intarsia.tasks.metrics import METRICS, Score, compare, score
from intarsia.tasks.mlm import Masked, MaskedOptions
from intarsia.tasks.parse import Parse, ParseOptions
from intarsia.tasks.prototypes import PrototypeClassify
from intarsia.tasks.registry import (
    CONTEXT,
    TASKS,
    Kind,
    base_settings,
    bind,
    build,
    from_module,
    head_for,
    infer_columns,
    infer_task,
    method_settings,
    owner_of,
)
from intarsia.tasks.regress import Regress, RegressOptions
from intarsia.tasks.run import Evaluation, evaluate, predict
from intarsia.tasks.seq2seq import Seq2Seq, Seq2SeqOptions
from intarsia.tasks.tag import Tag, TagOptions
from intarsia.train.collapse import collapsed

__all__ = [
    "CONTEXT",
    "METRICS",
    "TASKS",
    "Align",
    "AlignOptions",
    "BaseTask",
    "Causal",
    "CausalOptions",
    "Classify",
    "ClassifyOptions",
    "Evaluation",
    "Kind",
    "Masked",
    "MaskedOptions",
    "Options",
    "Parse",
    "ParseOptions",
    "PrototypeClassify",
    "Regress",
    "RegressOptions",
    "Score",
    "Seq2Seq",
    "Seq2SeqOptions",
    "Tag",
    "TagOptions",
    "base_settings",
    "bind",
    "build",
    "collapsed",
    "compare",
    "evaluate",
    "from_module",
    "head_for",
    "infer_columns",
    "infer_task",
    "method_settings",
    "owner_of",
    "predict",
    "score",
]
