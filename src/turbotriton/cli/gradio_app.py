"""`turbotriton serve gradio X`: a chat page for a running tritonserver, or for a workspace or model that is served on the way."""

import argparse

from .hub import add_served_model_options, served_model

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "gradio",
        help="serve a chat page",
        description="Serve a chat page. X is the address of a running tritonserver, or a workspace, a model folder or a hub id: then "
        "everything behind the page is started first and stopped with it. Nothing is sent to other hosts.",
    )
    parser.add_argument("target", metavar="X", help="HOST:PORT of tritonserver's gRPC, a workspace, a model folder, or a hub id")
    parser.add_argument("--model", help="the text door's name (default: the only one that the server has)")
    parser.add_argument(
        "--server-name", default="127.0.0.1", help="address that the page listens on (default: %(default)s); 0.0.0.0: every one"
    )
    parser.add_argument("--server-port", type=int, default=6006, help="port that the page listens on (default: %(default)s)")
    add_served_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from turbotriton.client.demo import serve_page

    with served_model(args) as server:
        url = args.target if server is None else server.grpc
        return serve_page(url, model=args.model, server_name=args.server_name, server_port=args.server_port)
