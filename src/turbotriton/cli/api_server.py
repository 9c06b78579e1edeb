"""`turbotriton serve api_server X`: the OpenAI-compatible server in front of tritonserver."""

import argparse
import logging
import signal
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbotriton.contract import env
from turbotriton.contract.errors import InvalidInputError

from .process_setup import collect_seldom, usable_cores
from .served_model import add_served_model_options, served_model

if TYPE_CHECKING:
    from turbotriton.client.openai.app import ServerOptions

__all__ = ["add_parser", "check_workers", "workers_for"]

logger = logging.getLogger(__name__)

MAX_WORKERS = 32
MIN_CORES_FOR_SEVERAL, MAX_WORKERS_BY_THEMSELVES = 8, 8
GRACE_S = 10  # for answers under way at a stop, as tritonserver's; an idle client over TLS would hold it up for 30


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "api_server",
        help="serve OpenAI's API",
        description="Serve OpenAI's API (and LMDeploy's additions). X is the gRPC address of a running tritonserver, several with "
        "commas between, or a workspace, a model folder or a hub id: then tritonserver is started first and stopped at the end.",
    )
    parser.add_argument(
        "target", metavar="X", help="HOST:PORT[,HOST:PORT...] of tritonserver's gRPC, a workspace, a model folder, or a hub id"
    )
    parser.add_argument("--server-name", default="127.0.0.1", help="address to listen on; 0.0.0.0: every one")
    parser.add_argument("--server-port", type=int, default=23333, help="port to listen on")
    parser.add_argument("--api-keys", nargs="*", default=[], metavar="KEY", help="callers need one of these (Bearer)")
    parser.add_argument("--ssl", action="store_true", help="serve https with the files that SSL_KEYFILE and SSL_CERTFILE name")
    parser.add_argument("--ssl-keyfile", type=Path, help="private key, PEM")
    parser.add_argument("--ssl-certfile", type=Path, help="certificate, PEM")
    for name in ("origins", "methods", "headers"):
        parser.add_argument(f"--allow-{name}", nargs="+", default=["*"], help=f"CORS: {name} that may call")
    parser.add_argument("--allow-credentials", action="store_true", help="CORS: with credentials")
    parser.add_argument(
        "--tool-call-parser", choices=("auto", "qwen", "llama3", "internlm2", "mistral"), default="auto",
        help="how the model writes tool calls; auto: by its chat template",
    )  # fmt: skip
    parser.add_argument("--qos-config-path", type=Path, help="JSON file of user groups and quotas, for the _qos endpoints")
    parser.add_argument("--qos-max-running", type=int, default=64, help="answers at once on the _qos endpoints")
    parser.add_argument(
        "--stream-interval", type=int, default=0,
        help="tokens in an event of a stream after its first; 0: 1, and one more for each 8 answers under way, up to 4",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=0,
        help=f"processes that answer behind the one port, up to {MAX_WORKERS}; 0: 1, from {MIN_CORES_FOR_SEVERAL} cores on one for two of "
        f"them, up to {MAX_WORKERS_BY_THEMSELVES}",
    )  # fmt: skip
    parser.add_argument(
        "--log-level",
        type=str.lower,
        choices=("debug", "info", "warning", "error", "critical"),
        default="info",
        help="of the server, in small letters or capitals",
    )
    add_served_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from turbotriton.client.kserve import check_url
    from turbotriton.client.openai.app import ServerOptions, make_gate

    if not 0 < args.server_port < 65536:
        raise InvalidInputError(f"--server-port is {args.server_port}; it must be from 1 to 65535")
    if args.qos_max_running < 1:
        raise InvalidInputError(f"--qos-max-running is {args.qos_max_running}; it must be 1 or more")
    if not 0 <= args.stream_interval <= 1024:
        raise InvalidInputError(f"--stream-interval is {args.stream_interval}; it must be from 0 to 1024")
    check_workers(args.workers, "--workers")
    keyfile, certfile = _ssl_files(args)
    with served_model(args) as own_server:
        urls = [check_url(url) for url in args.target.split(",")] if own_server is None else [own_server.grpc]
        options = ServerOptions(
            urls=urls,
            api_keys=args.api_keys,
            allow_origins=args.allow_origins,
            allow_methods=args.allow_methods,
            allow_headers=args.allow_headers,
            allow_credentials=args.allow_credentials,
            tool_call_parser=args.tool_call_parser,
            qos_config_path=args.qos_config_path,
            qos_max_running=args.qos_max_running,
            stream_interval=args.stream_interval,
        )
        make_gate(options)  # a QoS file that cannot be read is refused before anything is said
        scheme = "https" if certfile else "http"
        print(
            f"OpenAI's API at {scheme}://{args.server_name}:{args.server_port}/v1 for {', '.join(urls)}; Ctrl-C stops it.",
            flush=True,
        )
        config: dict[str, Any] = {
            "host": args.server_name, "port": args.server_port, "log_level": args.log_level, "access_log": args.log_level == "debug",
            "ssl_keyfile": keyfile, "ssl_certfile": certfile, "timeout_graceful_shutdown": GRACE_S,
        }  # fmt: skip
        num_workers = args.workers or workers_for(usable_cores())
        if num_workers == 1:
            _run_alone(options, config)
        else:
            from .workers import run_workers

            run_workers(options, num_workers, **config)
    return 0


def check_workers(workers: int, name: str) -> None:
    """Raises InvalidInputError."""
    if not 0 <= workers <= MAX_WORKERS:
        raise InvalidInputError(f"{name} is {workers}; it must be from 0 to {MAX_WORKERS}")


def workers_for(num_cores: int) -> int:
    """Enough for bursts to a fast model where cores are left for them; a burst of 64 requests keeps one core for 50 ms."""
    return 1 if num_cores < MIN_CORES_FOR_SEVERAL else min(num_cores // 2, MAX_WORKERS_BY_THEMSELVES)


def _run_alone(options: "ServerOptions", config: dict[str, Any]) -> None:
    import uvicorn

    from turbotriton.client.openai.app import make_app

    server = uvicorn.Server(uvicorn.Config(make_app(options), **config))
    collect_seldom()
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn stops cleanly, then raises what it caught once more
        signal.signal(number, lambda *_: None)
    try:
        server.run()
    except SystemExit:  # uvicorn's way to say that it could not listen; it has logged why
        raise InvalidInputError(f"{config['host']}:{config['port']} cannot be taken; choose another --server-port") from None


def _ssl_files(args: argparse.Namespace) -> tuple[Path | None, Path | None]:
    keyfile, certfile = args.ssl_keyfile, args.ssl_certfile
    if args.ssl:
        keyfile, certfile = keyfile or env.ssl_keyfile(), certfile or env.ssl_certfile()
    if args.ssl and (keyfile is None or certfile is None):
        raise InvalidInputError("--ssl needs the variables SSL_KEYFILE and SSL_CERTFILE, or --ssl-keyfile and --ssl-certfile")
    if (keyfile is None) != (certfile is None):
        raise InvalidInputError("--ssl-keyfile and --ssl-certfile belong together; give both")
    for path in (keyfile, certfile):
        if path is not None and not path.is_file():
            raise InvalidInputError(f"{path}: is no file; give the PEM file's path")
    if keyfile is not None and certfile is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certfile, keyfile)
        except (ssl.SSLError, OSError) as error:
            raise InvalidInputError(
                f"{keyfile} and {certfile} are no key and certificate that belong together: {error}"
            ) from None
    return keyfile, certfile
