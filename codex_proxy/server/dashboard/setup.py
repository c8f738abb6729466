"""What to paste into which client: the texts that the page shows, made for this proxy's address.

They are the shortest that work; docs/clients.md says more. Where the client key goes stands `YOUR_KEY`,
because the proxy knows keys only by their digests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from codex_proxy.protocol.wire import JsonObject

KEY = "YOUR_KEY"


@dataclass(slots=True, frozen=True)
class Step:
    """One thing to do: a title, and a text to copy."""

    title: str
    language: str
    text: str


def clients(base_url: str, model: str, *, needs_key: bool) -> list[JsonObject]:
    """Return what to do in each client, for a proxy at *base_url* that serves *model*.

    A client that insists on a key gets one where none is needed too: it is not looked at then.
    """
    key = KEY if needs_key else "none-needed"
    told: list[tuple[str, str, Sequence[Step]]] = [
        ("claude-code", "Claude Code", _claude_code(base_url, key)),
        ("codex", "Codex CLI", _codex(base_url, key, model, needs_key=needs_key)),
        ("openai-python", "OpenAI SDK", _openai(base_url, key, model)),
        ("anthropic-python", "Claude SDK", _anthropic(base_url, key)),
        ("opencode", "opencode", _opencode(base_url, key, model)),
        ("aider", "aider", _aider(base_url, key, model)),
        ("cursor", "Cursor", _cursor(base_url, key, model)),
        ("curl", "curl", _curl(base_url, key, model, needs_key=needs_key)),
    ]
    return [
        {
            "id": name,
            "name": title,
            "steps": [{"title": step.title, "language": step.language, "text": step.text} for step in steps],
        }
        for name, title, steps in told
    ]


def _claude_code(base_url: str, key: str) -> Sequence[Step]:
    return (
        Step(
            "in a shell",
            "sh",
            f"export ANTHROPIC_BASE_URL={base_url}\nexport ANTHROPIC_AUTH_TOKEN={key}\nclaude\n",
        ),
        Step(
            "for good, in ~/.claude/settings.json",
            "json",
            "{\n"
            '  "env": {\n'
            f'    "ANTHROPIC_BASE_URL": "{base_url}",\n'
            f'    "ANTHROPIC_AUTH_TOKEN": "{key}"\n'
            "  }\n"
            "}\n",
        ),
    )


def _codex(base_url: str, key: str, model: str, *, needs_key: bool) -> Sequence[Step]:
    # The name is what switches on compaction and the rest of what the CLI knows of its own backend.
    config = (
        f'model = "{model}"\n'
        'model_provider = "pool"\n'
        "\n"
        "[model_providers.pool]\n"
        'name = "OpenAI"\n'
        f'base_url = "{base_url}/backend-api/codex"\n'
        'wire_api = "responses"\n'
        "supports_websockets = true\n"
    )
    if not needs_key:
        return (Step("in ~/.codex/config.toml", "toml", config), Step("then", "sh", "codex\n"))
    return (
        Step("in ~/.codex/config.toml", "toml", config + 'env_key = "POOL_KEY"\n'),
        Step("then", "sh", f"export POOL_KEY={key}\ncodex\n"),
    )


def _openai(base_url: str, key: str, model: str) -> Sequence[Step]:
    return (
        Step(
            "Python",
            "python",
            "from openai import OpenAI\n"
            "\n"
            f'client = OpenAI(base_url="{base_url}/v1", api_key="{key}")\n'
            f'answer = client.responses.create(model="{model}", input="Say hello.")\n'
            "print(answer.output_text)\n",
        ),
        Step(
            "any other language, by its environment",
            "sh",
            f"export OPENAI_BASE_URL={base_url}/v1\nexport OPENAI_API_KEY={key}\n",
        ),
    )


def _anthropic(base_url: str, key: str) -> Sequence[Step]:
    return (
        Step(
            "Python",
            "python",
            "from anthropic import Anthropic\n"
            "\n"
            f'client = Anthropic(base_url="{base_url}", api_key="{key}")\n'
            "answer = client.messages.create(\n"
            '    model="claude-sonnet-4-5", max_tokens=200, messages=[{"role": "user", "content": "Say hello."}]\n'
            ")\n"
            "print(answer.content[0].text)\n",
        ),
    )


def _opencode(base_url: str, key: str, model: str) -> Sequence[Step]:
    return (
        Step(
            "in opencode.json",
            "json",
            "{\n"
            '  "$schema": "https://opencode.ai/config.json",\n'
            '  "provider": {\n'
            '    "codex-proxy": {\n'
            '      "npm": "@ai-sdk/openai-compatible",\n'
            '      "name": "codex-proxy",\n'
            f'      "options": {{ "baseURL": "{base_url}/v1", "apiKey": "{key}" }},\n'
            f'      "models": {{ "{model}": {{}} }}\n'
            "    }\n"
            "  }\n"
            "}\n",
        ),
    )


def _aider(base_url: str, key: str, model: str) -> Sequence[Step]:
    return (
        Step(
            "in a shell",
            "sh",
            f"export OPENAI_API_BASE={base_url}/v1\nexport OPENAI_API_KEY={key}\naider --model openai/{model}\n",
        ),
    )


def _cursor(base_url: str, key: str, model: str) -> Sequence[Step]:
    return (
        Step(
            "Settings, Models, API Keys; Cursor asks from its own servers, so the address has to be one that they reach",
            "text",
            f"OpenAI API Key:            {key}\nOverride OpenAI Base URL:  {base_url}/v1\nAdd model:                 {model}\n",
        ),
    )


def _curl(base_url: str, key: str, model: str, *, needs_key: bool) -> Sequence[Step]:
    authorization = f"  -H 'Authorization: Bearer {key}' \\\n" if needs_key else ""
    return (
        Step(
            "in a shell",
            "sh",
            f"curl {base_url}/v1/chat/completions \\\n"
            f"{authorization}"
            "  -H 'Content-Type: application/json' \\\n"
            f'  -d \'{{"model": "{model}", "messages": [{{"role": "user", "content": "Say hello."}}]}}\'\n',
        ),
    )
