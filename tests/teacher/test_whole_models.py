"""Teachers with a model of their own, beside LoRAs on the base: a server each, one client."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from opd_core.api.load import load_spec
from opd_core.errors import RefusedError
from opd_core.exit_codes import ExitCode
from opd_core.models.adapter_file import read_teacher
from opd_core.models.fingerprint import fingerprint
from opd_core.models.teacher_files import teacher_files
from opd_core.roles import teacher_servers
from opd_core.scales import Scales
from opd_core.teachers.agreement import check_identity, self_test
from opd_core.teachers.grpc_client import GrpcTeachers, connect
from opd_core.teachers.local import LocalTeachers
from opd_core.uris import resolve

from tests.teacher.conftest import QUICK, TEACHERS, Rows, spec_text
from tests.teacher_server import TeacherServer

OF_OCR = {"adapter: {uri: pvc://tiny-world/teachers/ocr}": "model: {uri: pvc://models/ocr}"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, whole_claims: Path) -> Iterator[list[TeacherServer]]:
    """The servers of a spec whose ocr teacher is a model of its own."""
    folder = tmp_path_factory.mktemp("mixed")
    spec = folder / "spec.yaml"
    spec.write_text(spec_text(OF_OCR))
    servers = []
    for group in teacher_servers(load_spec(spec).spec):
        (folder / group[0]).mkdir()
        servers.append(TeacherServer(folder / group[0], spec, whole_claims, group).start())
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def both(mixed: list[TeacherServer]) -> Iterator[GrpcTeachers]:
    client = connect([server.address for server in mixed], QUICK)
    yield client
    client.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, whole_claims: Path):
    spec_file = tmp_path_factory.mktemp("spec") / "spec.yaml"
    spec_file.write_text(spec_text(OF_OCR))
    spec = load_spec(spec_file).spec
    return {each.name: teacher_files(spec, each, partial(resolve, claims=whole_claims)) for each in spec.teachers}


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_fused_teacher_answers_as_its_lora_does_and_the_others_as_before(both, client, rows: Rows, teacher: str):
    """Two roundings to float16 apart."""
    fused, lora = rows.ask(both, teacher).result(), rows.ask(client, teacher).result()
    torch.testing.assert_close(fused, lora, rtol=2e-3, atol=2e-3)
    other = rows.ask(client, "geneval" if teacher == "ocr" else "ocr").result()
    assert (fused - other).abs().max() > 0.05


def test_in_process_they_differ_by_float32_s_rounding(tiny_base, tiny_world, files, rows: Rows):
    mixed = LocalTeachers(tiny_base, files, precision="FP32", max_sequence_length=10)
    loras = {name: read_teacher(tiny_world / "teachers" / name) for name in TEACHERS}
    plain = LocalTeachers(tiny_base, loras, precision="FP32", max_sequence_length=10)
    for teacher in TEACHERS:
        ours, theirs = rows.ask(mixed, teacher).result(), rows.ask(plain, teacher).result()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_servers_of_both_kinds_agree_about_the_base_and_each_names_its_teachers(both, files, tiny_base, rows: Rows):
    info = both.describe()
    assert info.base == fingerprint(tiny_base)
    assert set(info.teachers) == set(TEACHERS)
    check_identity(both, base=tiny_base, teachers=files, max_sequence_length=10)
    scales, student = dict.fromkeys(TEACHERS, Scales(4.5)), lambda x, _: 0 * x
    self_test(both, scales, ["geneval", "ocr"], (16, 8, 8), rows.conditioning[0], rows.negative, student, 1e-3)
    with pytest.raises(RefusedError, match="teacher ocr: the server has sha256:"):
        check_identity(both, base=tiny_base, teachers={"ocr": files["geneval"]}, max_sequence_length=10)


def test_it_has_no_base_to_ask(both, rows: Rows):
    with pytest.raises(RefusedError, match="no base answers here: ocr has a model of its own"):
        rows[:1].ask(both, "ocr", base=True).result()


def test_a_server_of_two_models_does_not_start(make_server, whole_claims):
    server = make_server(claims=whole_claims, change=OF_OCR)
    server.launch()
    assert server.wait() == ExitCode.INVALID
    assert "geneval, ocr, aesthetic have several; name some that have one with --teacher" in server.log


def test_a_server_of_a_model_that_cannot_teach_the_base_does_not_start(make_server, whole_claims, tmp_path):
    claims = tmp_path / "claims"
    (claims / "models" / "ocr").mkdir(parents=True)
    (claims / "tiny-world").symlink_to(whole_claims / "tiny-world")
    for part in (whole_claims / "models" / "ocr").iterdir():
        if part.name != "text_encoder":
            (claims / "models" / "ocr" / part.name).symlink_to(part)
    (claims / "models" / "ocr" / "text_encoder").symlink_to(claims / "tiny-world" / "base" / "text_encoder_2")
    server = make_server("ocr", claims=claims, change=OF_OCR)
    server.launch()
    assert server.wait() == ExitCode.INVALID
    assert "spec.teachers[1].model.uri is pvc://models/ocr: its text_encoder is sha256:" in server.log
