"""`turbotriton serve gradio X`: a chat page for a running tritonserver or OpenAI server, a workspace or a model that is served for it."""

import argparse

from turbotriton.contract import env

from .served_model import add_served_model_options, served_model

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "gradio",
        help="serve a chat page",
        description="Serve a chat page. X is the address of a running tritonserver or of an OpenAI server, or a workspace, a model folder "
        "or a hub id: then everything behind the page is started first and stopped with it. Nothing is sent to other hosts.",
    )
    parser.add_argument(
        "target",
        metavar="X",
        help="HOST:PORT of tritonserver's gRPC, http://HOST:PORT of an OpenAI server, a workspace, a model folder, or a hub id",
    )
    parser.add_argument("--model", help="the model's name (default: the only one of tritonserver, the first of an OpenAI server)")
    parser.add_argument("--api-key", default=None, help="of an OpenAI server; unset: the variable OPENAI_API_KEY")
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
        return serve_page(
            url,
            model=args.model,
            server_name=args.server_name,
            server_port=args.server_port,
            api_key=args.api_key or env.openai_api_key(),
        )
