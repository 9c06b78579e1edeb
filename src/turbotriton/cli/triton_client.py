"""`turbotriton serve triton_client HOST:PORT`: terminal chat with a running tritonserver."""

import argparse

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "triton_client",
        help="chat in the terminal with a running tritonserver",
        description="Chat in the terminal with the model of a running tritonserver; the history is kept on the server. "
        "Enter sends a line, Ctrl-C stops an answer, /help lists the rest. Input that is no terminal: one question a line.",
    )
    parser.add_argument("url", metavar="HOST:PORT", help="tritonserver's gRPC address, such as localhost:8001")
    parser.add_argument("--session-id", type=int, help="the conversation's number on the server (default: a random one)")
    parser.add_argument(
        "--cap", choices=("chat", "completion"), default="chat", help="completion sends the text without the chat template"
    )
    streaming = parser.add_mutually_exclusive_group()
    streaming.add_argument(
        "--stream-output", dest="stream", action="store_true", default=True, help="print as it is generated (the default)"
    )
    streaming.add_argument("--no-stream", dest="stream", action="store_false", help="print each answer when it is complete")
    parser.add_argument("--once", metavar="QUESTION", help="ask one question, print the answer, leave")
    parser.add_argument("--multiline", action="store_true", help="a blank line sends, not Enter (/multi switches)")
    parser.add_argument("--system", help="system prompt, the first message of the conversation")
    parser.add_argument("--max-tokens", type=int, default=512, help="most tokens in one answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="(default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=1, help="1: greedy; 0: off (default: %(default)s)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the sampling; read when a conversation starts")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from turbotriton.client.terminal import TerminalOptions, run_terminal
    from turbotriton.client.turbomind_door import ChatSampling

    sampling = ChatSampling(
        max_tokens=args.max_tokens,
        top_p=args.top_p,
        temperature=args.temperature,
        repetition_penalty=args.repetition_penalty,
        top_k=args.top_k,
        seed=args.seed,
    )
    options = TerminalOptions(
        session_id=args.session_id,
        cap=args.cap,
        stream=args.stream,
        system=args.system,
        once=args.once,
        multiline=args.multiline,
        sampling=sampling,
    )
    return run_terminal(args.url, options)
