"""The server of examples/serve: its answers, its queue, failures, and tasks that change."""

from __future__ import annotations

import asyncio
import io
import re
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from support.serving import (
    HEAD,
    PART,
    Held,
    connect,
    make_bank,
    picture,
    post,
    refused,
    serving,
    wait_until,
)
from typer.testing import CliRunner

from examples.serve.uploads import prepare
from vpt_fast import PromptBank, load_adapter, save_adapter
from vpt_fast.backbones.demo_backbone import DEMO_ARGS, DEMO_CHECKPOINT, demo_backbone
from vpt_fast.cli.app import app as command
from vpt_fast.train.data.pictures import FORMATS
from vpt_fast.train.run.bank_folder import open_bank

UPLOAD = 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def bank(folder: Path) -> PromptBank:
    return make_bank(folder)


@pytest.fixture(scope="module")
def client(bank: PromptBank) -> Any:
    limits = {"max_upload_bytes": UPLOAD, "max_pixels": 100_000, "max_wait": 0.02}
    with serving(bank, **limits) as (client, _):
        yield client


def alone(bank: PromptBank, task: str, file: bytes) -> dict[str, float]:
    entry = bank.task(task)
    logits = bank(prepare(io.BytesIO(file), entry.inputs, 10**9)[None], [task])[0]
    assert entry.class_names is not None
    return dict(zip(entry.class_names, logits.softmax(dim=0).tolist(), strict=True))


def test_mixed_requests_are_answered_as_single_ones(
    bank: PromptBank, client: httpx2.Client
) -> None:
    async def ask() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(base_url=client.base_url, timeout=30) as many:
            return await asyncio.gather(
                *(
                    many.post(
                        "/predict",
                        files={"image": picture(i, (30 + i, 40))},
                        data={"task": f"task-{i % 3}", "topk": 100},
                    )
                    for i in range(30)
                )
            )

    responses = asyncio.run(ask())
    for i, response in enumerate(responses):
        body = response.json()
        assert response.status_code == 200, body
        assert body["task"] == f"task-{i % 3}" and body["ms"] > 0
        found = {item["name"]: item["probability"] for item in body["classes"]}
        want = alone(bank, f"task-{i % 3}", picture(i, (30 + i, 40)))
        assert found == pytest.approx(want, abs=1e-5)
        shares = list(found.values())
        assert shares == sorted(shares, reverse=True)
    assert max(response.json()["batch_size"] for response in responses) > 1
    text = client.get("/metrics").text
    batches, tasks = (
        float(re.search(rf"^vpt_serve_batch_tasks_{part} (\S+)$", text, re.M).group(1))  # type: ignore[union-attr]
        for part in ("count", "sum")
    )
    assert tasks > batches  # several tasks in one batch


def test_an_image_is_prepared_as_predict_does(
    folder: Path, client: httpx2.Client, tmp_path: Path
) -> None:
    file = picture(5, (70, 45), "JPEG")
    (tmp_path / "image.jpg").write_bytes(file)
    for task in ("task-0", "task-1"):
        paths = [str(folder / task), str(tmp_path / "image.jpg")]
        result = CliRunner().invoke(command, ["predict", *paths])
        assert result.exit_code == 0, result.output
        want = [(name, float(p)) for name, p in re.findall(r"(class \S+) ([\d.]+)%", result.stdout)]
        body = client.post("/predict", files={"image": file}, data={"task": task}).json()
        assert [item["name"] for item in body["classes"]] == [name for name, _ in want]
        shares = [100 * item["probability"] for item in body["classes"]]
        assert shares == pytest.approx([p for _, p in want], abs=0.0051)


def test_each_class_of_several_labels_has_a_probability_of_its_own(
    bank: PromptBank, folder: Path, tmp_path: Path
) -> None:
    names = list(bank.task("task-0").class_names or ())
    model = load_adapter(demo_backbone(len(names)), folder / "task-0")
    options: dict[str, Any] = {"model_args": DEMO_ARGS, "checkpoint": DEMO_CHECKPOINT.name}
    save_adapter(model, tmp_path / "task", class_names=names, multi_label=True, **options)
    several, _ = open_bank(tmp_path)
    file = picture(3)
    logits = several(prepare(io.BytesIO(file), several.task("task").inputs, 10**9)[None], ["task"])
    with serving(several) as (client, _):
        assert client.get("/tasks").json()["tasks"][0]["multi_label"] is True
        body = client.post("/predict", files={"image": file}, data={"task": "task"}).json()
    found = {item["name"]: item["probability"] for item in body["classes"]}
    wanted = dict(zip(names, torch.sigmoid(logits[0]).tolist(), strict=True))
    assert found == pytest.approx(wanted, abs=1e-5)


def test_topk_bounds_the_classes(client: httpx2.Client) -> None:
    assert [len(post(client, topk=k).json()["classes"]) for k in (1, 2, 10**30)] == [1, 2, 3]
    plain = client.post("/predict", files={"image": picture(0)}, data={"task": "task-2"})
    assert len(plain.json()["classes"]) == 5


def test_views(bank: PromptBank, client: httpx2.Client) -> None:
    found = client.get("/tasks").json()
    assert [task["name"] for task in found["tasks"]] == list(bank.tasks)
    assert [task["method"] for task in found["tasks"]] == ["vpt-deep", "vapt", "linear"]
    assert found["tasks"][1] | {"num_classes": 4, "input_size": [3, 32, 32]} == found["tasks"][1]
    assert found["limits"] == {
        "upload_bytes": UPLOAD,
        "pixels": 100_000,
        "formats": list(FORMATS),
    }
    health = client.get("/health")
    assert health.status_code == 200 and health.json() == {
        "status": "ok",
        "worker_alive": True,
        "worker_busy_seconds": 0,
        "queue_images": 0,
        "requests": 0,
        "tasks": 3,
    }
    before = _counts(client)
    assert post(client, "task-1").status_code == 200 and post(client, "x").status_code == 404
    after = _counts(client)
    for name in ('predictions_total{task="task-1"}', 'refusals_total{reason="unknown_task"}'):
        assert after[name] == before.get(name, 0) + 1
    assert after["batch_images_count"] == before["batch_images_count"] + 1
    assert after["queue_images"] == 0 and after["requests"] == 0
    kinds = {"": "text/html", "static/page.js": "javascript", "static/page.css": "css"}
    for path, kind in kinds.items():
        page = client.get(path)
        assert page.status_code == 200 and kind in page.headers["content-type"]
    policy = client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy


def _counts(client: httpx2.Client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("vpt_serve_"))
    return {name.removeprefix("vpt_serve_"): float(value) for name, value in pairs}


def in_threads(*calls: Any) -> tuple[list[threading.Thread], list[Any]]:
    answers: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        answers[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    return threads, answers


def queued(client: httpx2.Client) -> int:
    return int(client.get("/health").json()["queue_images"])


def test_a_full_server_refuses_with_a_time_to_retry(bank: PromptBank) -> None:
    held = Held(bank)
    with serving(held, max_queue=2, max_requests=4, max_batch=1, max_wait=0) as (client, _):
        first, one = in_threads(lambda: post(client))
        assert held.entered.wait(10)
        more, two = in_threads(lambda: post(client, seed=1), lambda: post(client, seed=2))
        wait_until(lambda: queued(client) == 2)
        full = post(client)
        assert "2 images are waiting already" in refused(full, 503, "queue_full")
        assert int(full.headers["retry-after"]) >= 1
        # A client that is still uploading counts too.
        with connect(client) as slow:
            slow.sendall(f"{HEAD}Content-Length: 5000\r\n\r\n{PART}".encode())
            wait_until(lambda: client.get("/health").json()["requests"] == 4)
            full = post(client)
            assert "4 images are being worked on" in refused(full, 503, "too_many_requests")
            assert int(full.headers["retry-after"]) >= 1
        wait_until(lambda: client.get("/health").json()["requests"] == 3)
        assert client.get("/health").json()["worker_busy_seconds"] > 0
        held.go.set()
        for thread in (*first, *more):
            thread.join(10)
        assert [answer.status_code for answer in one + two] == [200] * 3
        assert post(client).status_code == 200


def test_expired_and_cancelled_requests_are_not_computed(bank: PromptBank) -> None:
    held = Held(bank)
    with serving(held, request_seconds=0.4, max_batch=1, max_wait=0) as (client, _):
        first, one = in_threads(lambda: post(client, "task-0"))
        assert held.entered.wait(10)
        late = post(client, "task-1")
        assert "in time" in refused(late, 504, "timeout")
        first[0].join(10)
        refused(one[0], 504, "timeout")
        assert queued(client) == 0
        with connect(client) as leaving:
            form = httpx2.Request(
                "POST", client.base_url, files={"image": picture(0)}, data={"task": "task-2"}
            )
            body = form.read()
            kind = form.headers["content-type"]
            head = HEAD.replace("multipart/form-data; boundary=x", kind)
            leaving.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: queued(client) == 1)
        wait_until(lambda: queued(client) == 0)
        held.go.set()
        assert post(client, "task-0").status_code == 200
        assert held.seen == [("task-0",), ("task-0",)]
        counts = _counts(client)
        assert counts['refusals_total{reason="timeout"}'] == 2
        assert counts['refusals_total{reason="client_gone"}'] == 1


def test_a_failing_batch_is_answered_and_the_server_lives_on(bank: PromptBank) -> None:
    held = Held(bank)
    held.failing = {"task-1"}
    with serving(held, max_wait=0.0) as (client, _):
        first, one = in_threads(lambda: post(client, "task-0"))
        assert held.entered.wait(10)
        names = ("task-1", "task-2", "task-1", "task-0")
        more, answers = in_threads(*(lambda name=name: post(client, name) for name in names))
        wait_until(lambda: queued(client) == 4)
        held.go.set()
        for thread in (*first, *more):
            thread.join(10)
        assert one[0].status_code == 200
        for name, answer in zip(names, answers, strict=True):
            if name == "task-1":
                refused(answer, 500, "batch_failed")
            else:
                assert answer.status_code == 200 and answer.json()["task"] == name
        held.failing = set()
        assert post(client, "task-1").status_code == 200
        assert client.get("/health").status_code == 200


def test_tasks_come_and_go_while_it_serves(folder: Path) -> None:
    bank = make_bank(folder / "changing")
    held = Held(bank)
    with serving(held, max_wait=0.0) as (client, _):
        first, one = in_threads(lambda: post(client, "task-2"))
        assert held.entered.wait(10)
        names = ("task-0", "task-1", "task-2")
        more, answers = in_threads(*(lambda name=name: post(client, name) for name in names))
        wait_until(lambda: queued(client) == 3)
        for name in ("task-0", "task-1"):
            bank.remove(name)
        bank.add("task-1", folder / "changing" / "task-0")
        held.go.set()
        for thread in (*first, *more):
            thread.join(10)
        assert "was removed" in refused(answers[0], 404, "unknown_task")
        assert "was replaced" in refused(answers[1], 503, "task_replaced")
        assert answers[2].status_code == 200 and one[0].status_code == 200
        refused(post(client, "task-0"), 404, "unknown_task")
        found = post(client, "task-1").json()["classes"]
        assert {item["name"] for item in found} == {"class 0.0", "class 0.1", "class 0.2"}


class Broken(Held):
    """A bank that fails outside of a batch."""

    def task(self, name: str) -> Any:
        raise RuntimeError("the secret of /etc/passwd")


def test_unexpected_errors_do_not_leak_their_message(bank: PromptBank) -> None:
    with serving(Broken(bank)) as (client, _):
        refused(post(client), 500, "internal_error")
        assert client.get("/health").status_code == 200


def test_health_reports_that_the_thread_has_ended(bank: PromptBank) -> None:
    with serving(bank) as (client, server):
        server.config.app.state.batcher.close()
        health = client.get("/health")
        assert health.status_code == 503
        assert health.json()["status"] == "down" and not health.json()["worker_alive"]
        refused(post(client), 503, "shutting_down")


def test_a_shutdown_answers_accepted_requests(bank: PromptBank) -> None:
    held = Held(bank)
    with serving(held, max_batch=1, max_wait=0.0) as (client, server):
        threads, answers = in_threads(*(lambda i=i: post(client, seed=i) for i in range(3)))
        wait_until(lambda: held.entered.is_set() and queued(client) == 2)
        server.should_exit = True
        wait_until(lambda: not server.servers[0].is_serving())
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(client.base_url.join("/health"))
        held.go.set()
        for thread in threads:
            thread.join(10)
        assert [answer.status_code for answer in answers] == [200] * 3
