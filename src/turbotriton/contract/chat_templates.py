"""LMDeploy's registered model names and the session_len of their chat templates (both v0.3.0 and v0.4.0 names).

`convert` writes `session_len = template session_len + 8` for these names, as LMDeploy does. The templates themselves are not
here: a checkpoint brings its own.
"""

__all__ = ["template_session_len"]

_NAMES_BY_SESSION_LEN: dict[int, tuple[str, ...]] = {
    2048: (
        *("base", "llama", "vicuna", "wizardlm", "internlm", "internlm-chat", "internlm-chat-7b"),
        *("baichuan-base", "baichuan-7b", "baichuan2", "baichuan2-7b", "puyu", "falcon", "chatglm", "chatglm2-6b"),
        *("solar", "solar-70b", "ultracm", "ultralm", "yi", "yi-chat", "yi-200k", "yi-34b"),
        *("mistral", "mixtral", "Mistral-7B-Instruct", "Mixtral-8x7B-Instruct", "gemma"),
        *("deepseek", "deepseek-chat", "deepseek-vl", "yi-vl", "dbrx"),
    ),
    4096: (
        *("mini-gemini-vicuna", "internlm-20b", "internlm-xcomposer2", "llama2", "llama-2", "llama-2-chat"),
        *("codellama", "internvl-zh", "deepseek-coder", "llava-chatml", "internvl-zh-hermes2"),
    ),
    8192: ("internlm-chat-7b-8k", "internlm-chat-20b", "llama3", "qwen", "qwen-7b", "qwen-14b"),
    16384: ("internlm-xcomposer2-4khd",),
    32768: (
        *("internlm2-1_8b", "internlm2-7b", "internlm2-20b", "internlm2"),
        *("internlm2-chat", "internlm2-chat-1_8b", "internlm2-chat-7b", "internlm2-chat-20b"),
    ),
}

_SESSION_LEN = {name: length for length, names in _NAMES_BY_SESSION_LEN.items() for name in names}


def template_session_len(model_name: str) -> int | None:
    """Tokens a session of that template may hold; None for a name that LMDeploy does not know."""
    return _SESSION_LEN.get(model_name)
