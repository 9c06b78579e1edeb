"""`turbotriton serve gradio HOST:PORT`: a chat page for a running tritonserver."""

import argparse

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "gradio",
        help="serve a chat page for a running tritonserver",
        description="Serve a chat page for the model of a running tritonserver. Nothing is sent to other hosts.",
    )
    parser.add_argument("url", metavar="HOST:PORT", help="tritonserver's gRPC address, such as localhost:8001")
    parser.add_argument("--model", help="the text door's name (default: the only one that the server has)")
    parser.add_argument(
        "--server-name", default="127.0.0.1", help="address that the page listens on (default: %(default)s); 0.0.0.0: every one"
    )
    parser.add_argument("--server-port", type=int, default=6006, help="port that the page listens on (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from turbotriton.client.demo import serve_page

    return serve_page(args.url, model=args.model, server_name=args.server_name, server_port=args.server_port)
