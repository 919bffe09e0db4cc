"""The command lines of trainer and evaluator, for the launcher and for every rank that it starts."""

import argparse
from pathlib import Path


def trainer() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m opd_trainer.launch",
        description="Distil the teachers of a spec into a student.",
        epilog="example: python -m opd_trainer.launch --spec spec.json --claims claims --work run "
        "--teachers 127.0.0.1:8001",
    )
    parser.add_argument("--spec", type=Path, required=True, help="an OPDDistillation, YAML or JSON")
    parser.add_argument("--claims", type=Path, required=True, help="folder with one entry per claim of pvc:// URIs")
    parser.add_argument("--work", type=Path, required=True, help="folder for log, checkpoints and student")
    parser.add_argument("--teachers", default="", help="HOST:PORT,... of the teacher servers (not for InProcess)")
    parser.add_argument("--metrics-port", type=int, default=0, help="port of /metrics and /progress; 0: none")
    parser.add_argument("--metrics-host", default="127.0.0.1", help="its address; :: is all")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--tensorboard", action="store_true", help="also write WORK/train/tensorboard")
    parser.add_argument("--debug", action="store_true", help="show stack traces of expected errors")
    return parser


def teacher_trainer() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m opd_trainer.launch teach",
        description="Train a teacher by reinforcement learning, as spec.teachers[].training says.",
        epilog="example: python -m opd_trainer.launch teach --spec spec.json --claims claims --teacher ocr",
    )
    parser.add_argument("--spec", type=Path, required=True, help="an OPDDistillation, YAML or JSON")
    parser.add_argument("--claims", type=Path, required=True, help="folder with one entry per claim of pvc:// URIs")
    parser.add_argument("--teacher", required=True, help="its name in spec.teachers")
    parser.add_argument("--metrics-port", type=int, default=0, help="port of /metrics and /progress; 0: none")
    parser.add_argument("--metrics-host", default="127.0.0.1", help="its address; :: is all")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--debug", action="store_true", help="show stack traces of expected errors")
    return parser


def evaluator() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m opd_trainer.launch evaluate",
        description="Score base, teachers and student on held-out prompts.",
        epilog="example: python -m opd_trainer.launch evaluate --spec spec.json --claims claims --student run/student "
        "--output evaluation",
    )
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--claims", type=Path, required=True, help="folder with one entry per claim")
    parser.add_argument("--student", type=Path, help="student directory")
    parser.add_argument("--models", default="base,teachers,student", help="which of base, teachers, student")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser
