"""`turbotriton serve api_client URL`: terminal chat with an OpenAI server's interactive endpoint."""

import argparse
import random

from turbotriton.contract import env

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "api_client",
        help="chat in the terminal with a running api_server",
        description="Chat in the terminal with a running api_server, which keeps the conversation. Enter sends a line, Ctrl-C stops an "
        "answer, /help lists the rest. Input that is no terminal: one question a line.",
    )
    parser.add_argument("url", metavar="URL", help="the server's address, such as http://localhost:23333")
    parser.add_argument(
        "--session-id", type=int, default=None, help="the conversation's number on the server (unset: a random one)"
    )
    parser.add_argument("--api-key", default=None, help="unset: the variable OPENAI_API_KEY")
    parser.add_argument("--max-tokens", type=int, default=512, help="most tokens in one answer")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=0.8, help="share of the probability that is drawn from")
    parser.add_argument("--top-k", type=int, default=40, help="tokens that are drawn from; 1: greedy; 0: off")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="1: off")
    parser.add_argument("--once", metavar="QUESTION", help="ask one question, print the answer, leave")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from turbotriton.client.api_client import APIClient, InteractiveConversation
    from turbotriton.client.terminal import Terminal

    session_id = random.randrange(1, 2**31) if args.session_id is None else args.session_id
    with APIClient(args.url, args.api_key or env.openai_api_key()) as client:
        title = f"{client.model} on {client.url}, session {session_id}"
        conversation = InteractiveConversation(
            client,
            session_id,
            request_output_len=args.max_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            repetition_penalty=args.repetition_penalty,
        )
        terminal = Terminal(conversation, conversation.describe)
        if args.once is not None:
            terminal.answer(args.once)
            conversation.end()
            return 0
        return terminal.chat(title)
