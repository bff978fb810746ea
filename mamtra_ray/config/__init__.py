"""The search-space file: what it may say (``sections``), how it is read (``files``), what keys mean (``explain``)."""

from mamtra_ray.config.explain import explain
from mamtra_ray.config.files import load_config, save_config
from mamtra_ray.config.search import IMPORTANCE_CRITERIA, SEARCH_STRATEGIES, SearchConfig
from mamtra_ray.config.sections import (
    AlignConfig,
    CacheConfig,
    Config,
    CorpusConfig,
    DistillConfig,
    EvaluateConfig,
    ProbeConfig,
    ResourcesConfig,
    StudentConfig,
    TeacherConfig,
)

__all__ = [
    "IMPORTANCE_CRITERIA",
    "SEARCH_STRATEGIES",
    "AlignConfig",
    "CacheConfig",
    "Config",
    "CorpusConfig",
    "DistillConfig",
    "EvaluateConfig",
    "ProbeConfig",
    "ResourcesConfig",
    "SearchConfig",
    "StudentConfig",
    "TeacherConfig",
    "explain",
    "load_config",
    "save_config",
]
