"""The models the simulated backend knows, as a table, and the objects it lists them with.

The Codex CLI drops the whole list when one object lacks one field, so every object has them all.
"""

from dataclasses import dataclass
from typing import Any

_EFFORTS = {
    "low": "Fast answers with lighter reasoning",
    "medium": "Speed and depth in balance",
    "high": "Deeper reasoning for complex problems",
    "xhigh": "Very deep reasoning for complex problems",
    "max": "The deepest reasoning for the hardest problems",
    "ultra": "The deepest reasoning with automatic delegation",
}
_TO_ULTRA = tuple(_EFFORTS)
_TO_MAX = _TO_ULTRA[:-1]
_TO_XHIGH = _TO_ULTRA[:-2]

SPARK_FAMILY = "codex_bengalfox"


@dataclass(slots=True, frozen=True)
class Model:
    """One row of the table."""

    slug: str
    name: str
    priority: int
    efforts: tuple[str, ...] = _TO_ULTRA
    default_effort: str = "low"
    context: int = 272_000
    max_context: int = 872_000
    lite: bool = True
    listed: bool = True
    fast: str = "1.5x speed, increased usage"
    fast_by_default: bool = False
    verbosity: str = "low"
    upgrade: str | None = None
    family: str = "codex"
    """Which limit its use counts against."""
    family_name: str | None = None


MODELS: dict[str, Model] = {
    model.slug: model
    for model in (
        Model("gpt-6.1-sol", "GPT-6.1-Sol", 1, fast="2x speed, increased usage"),
        Model("gpt-6-astra", "GPT-6-Astra", 2, fast="2x speed, increased usage"),
        Model("gpt-6-sol", "GPT-6-Sol", 3, default_effort="medium", fast="1.5x speed", fast_by_default=True),
        Model("gpt-6-luna", "GPT-6-Luna", 4, _TO_MAX, "medium", fast="1.5x speed", fast_by_default=True),
        Model("gpt-5.6-sol", "GPT-5.6-Sol", 5, upgrade="gpt-6-sol"),
        Model("gpt-6.1-terra", "GPT-6.1 Terra", 7, context=500_000, fast="1.5x speed"),
        Model("gpt-5.6-terra", "GPT-5.6-Terra", 8, default_effort="medium", upgrade="gpt-6-sol"),
        Model("gpt-5.6-luna", "GPT-5.6-Luna", 9, _TO_MAX, "medium", upgrade="gpt-6-luna"),
        Model("gpt-daybreak-blue-latest", "Daybreak Blue", 11, listed=False, fast=""),
        Model(
            "gpt-daybreak-red-latest",
            "Daybreak Red",
            12,
            default_effort="medium",
            context=372_000,
            max_context=372_000,
            listed=False,
            fast="",
            verbosity="high",
        ),
        Model(
            "gpt-5.5",
            "GPT-5.5",
            13,
            _TO_XHIGH,
            "medium",
            max_context=272_000,
            lite=False,
            upgrade="gpt-6-sol",
        ),
        Model(
            "gpt-5.3-codex-spark",
            "GPT-5.3-Codex-Spark",
            20,
            _TO_XHIGH,
            "high",
            context=128_000,
            max_context=128_000,
            lite=False,
            fast="",
            family=SPARK_FAMILY,
            family_name="GPT-5.3-Codex-Spark",
        ),
        Model("codex-auto-review", "Codex Auto Review", 43, _TO_MAX, "medium", listed=False),
    )
}

_SMALL = ("gpt-6-luna", "gpt-5.6-luna", "gpt-5.5")
_USUAL = tuple(slug for slug in MODELS if not slug.startswith("gpt-daybreak"))
_ALL = tuple(MODELS)

PLAN_MODELS: dict[str, tuple[str, ...]] = {
    "free": _SMALL,
    "go": _SMALL,
    "pro": _ALL,
    "enterprise": _ALL,
}
"""Which models a plan has; plans that are not named have the usual ones."""


def models_of(plan: str) -> list[str]:
    """Return the slugs that *plan* has."""
    return list(PLAN_MODELS.get(plan, _USUAL))


def model_of(slug: str) -> Model:
    """Return the row of *slug*; a slug nobody knows is an ordinary standard model."""
    known = MODELS.get(slug)
    return known if known is not None else Model(slug, slug, 99, _TO_XHIGH, "medium", lite=False, fast="")


def model_info(slug: str) -> dict[str, Any]:
    """Return the object with which the backend lists *slug*."""
    model = model_of(slug)
    return {
        "slug": model.slug,
        "display_name": model.name,
        "description": f"{model.name}, played by the simulator.",
        "default_reasoning_level": model.default_effort,
        "supported_reasoning_levels": [
            {"effort": effort, "description": _EFFORTS[effort]} for effort in model.efforts
        ],
        "shell_type": "unified_exec",
        "visibility": "list" if model.listed else "hide",
        "minimal_client_version": "0.1.0",
        "supported_in_api": True,
        "priority": model.priority,
        "additional_speed_tiers": ["fast"] if model.fast else [],
        "service_tiers": [{"id": "priority", "name": "Fast", "description": model.fast}]
        if model.fast
        else [],
        "default_service_tier": "priority" if model.fast_by_default else None,
        "available_access_programs": None,
        "model_specialty": None,
        "availability_nux": None,
        "upgrade": None
        if model.upgrade is None
        else {"model": model.upgrade, "migration_markdown": f"{model.upgrade} follows {model.slug}."},
        "base_instructions": "You are a coding agent. The simulator answers in place of a model.",
        "model_messages": None,
        "include_skills_usage_instructions": False,
        "include_plugin_usage_instructions": False,
        "include_apps_usage_instructions": False,
        "supports_reasoning_summary_parameter": True,
        "default_reasoning_summary": "none",
        "support_verbosity": True,
        "default_verbosity": model.verbosity,
        "apply_patch_tool_type": "freeform",
        "web_search_tool_type": "text_and_image",
        "truncation_policy": {"mode": "tokens", "limit": 10_000},
        "supports_parallel_tool_calls": True,
        "supports_image_detail_original": True,
        "context_window": model.context,
        "max_context_window": model.max_context,
        "auto_compact_token_limit": None,
        "comp_hash": "3000",
        "effective_context_window_percent": 95,
        "experimental_supported_tools": [],
        "input_modalities": ["text", "image"],
        "supports_search_tool": True,
        "supports_experimental_context": False,
        "use_responses_lite": model.lite,
        "supports_reasoning_effort_updates": model.lite,
        "node_repl_auto_review_required": False,
        "node_repl_disabled": False,
        "tool_mode": "code_mode_only" if model.lite else "direct",
        "multi_agent_version": "v2" if model.lite else "v1",
        "multi_agent_reasoning_effort": "xhigh" if "ultra" in model.efforts else None,
    }
