"""`python -m devcluster up | down | images | exec`: whole clusters by hand. See `tools/devcluster/README.md`."""

import argparse
import sys
from pathlib import Path

from devcluster import images, node


def main() -> int:
    parser = argparse.ArgumentParser(prog="devcluster", description="A real one-node Kubernetes on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a cluster; prints its kubeconfig")
    down = commands.add_parser("down", help="stop it and remove everything of it")
    down.add_argument("--images", action="store_true", help="remove its images too (gigabytes)")
    build = commands.add_parser("images", help="build the project's images and load them")
    build.add_argument("--extra", type=Path, help="folder with a Containerfile on top of the trainer's image")
    run = commands.add_parser("exec", help="run a command inside the cluster's namespaces")
    for each in (up, down, build, run):
        each.add_argument("--name", default="dev")
    run.add_argument("argv", nargs="+", help="after --")
    arguments = parser.parse_args()
    try:
        match arguments.command:
            case "up":
                running = node.up(arguments.name)
                running.make_default_volumes()
                print(f"export KUBECONFIG={running.kubeconfig}")
            case "down":
                node.down(arguments.name, arguments.images)
            case "images":
                for image in images.build(arguments.extra):
                    node.find(arguments.name).load(image)
            case "exec":
                print(node.find(arguments.name).run(*arguments.argv), end="")
    except RuntimeError as error:
        print(f"devcluster: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
