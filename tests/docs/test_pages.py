"""Each block of code in the documentation is run by a test, here where no other file does it, as a reader would."""

import re
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from PIL import Image
from torch.distributed.run import get_args_parser

from lightning_megatron import ParallelLayout
from lightning_megatron.callbacks.timeline import ideal_bubble
from tests.support.pages import DOCS, ROOT, blocks, names_of, path_of_test, run, script, shell
from tests.support.ranks import free_port

# Pages whose code another file runs, since it has more to say about what comes out.
ELSEWHERE = {
    "bert.md": "test_family_docs.py",
    "chat.md": "test_chat_docs.py",
    "checkpoints.md": "test_checkpoint_docs.py",
    "cli.md": "test_cli.py",
    "custom.md": "test_custom.py",
    "data.md": "test_data_docs.py",
    "examples.md": "test_examples.py",
    "from_ddp.md": "test_first_questions.py",
    "generation.md": "test_generation_asked.py",
    "heads.md": "test_family_docs.py",
    "hf.md": "test_hf_docs.py",
    "hf_data.md": "test_hf_data.py",
    "lightning.md": "test_logging.py",
    "lora.md": "test_lora_docs.py",
    "migrate_accelerate.md": "test_migration.py",
    "migrate_megatron_lm.md": "test_migration.py",
    "migrate_nemo2.md": "test_migration.py",
    "own_model.md": "test_own_models.py",
    "out_of_memory.md": "test_first_questions.py",
    "question_answering.md": "test_family_docs.py",
    "recipes.md": "test_recipes.py",
    "schedules.md": "test_schedulers.py",
    "t5.md": "test_family_docs.py",
    "too_big.md": "test_first_questions.py",
}
HERE = {
    "index.md",
    "layouts.md",
    "pipelines.md",
    "long_sequences.md",
    "experts.md",
    "multi_token_prediction.md",
    "latent_attention.md",
    "precision.md",
    "multi_node.md",
    "hangs.md",
    "monitoring.md",
    "../README.md",
}
CHECKED_BY_CI = {"contributing.md"}  # .ci/run
PAGES = [*sorted(path.name for path in DOCS.glob("*.md")), "../README.md"]


def test_every_page_with_code_is_run():
    with_code = {page for page in PAGES if blocks(page, "python", "bash", "yaml")}
    assert with_code - CHECKED_BY_CI == HERE | ELSEWHERE.keys()
    for page, test in ELSEWHERE.items():
        assert f'"{page}"' in path_of_test(test).read_text()


def test_blocks_name_a_language_that_is_run_or_a_reason_not_to():
    known = {"python", "bash", "yaml", "sh", "text"}
    for page in PAGES:
        fences = re.findall(r"^ *```(\w*)", (DOCS / page).read_text(), re.MULTILINE)
        assert set(fences[::2]) <= known, page
        assert set(fences[1::2]) <= {""}, page
        for code in blocks(page, "sh"):
            subprocess.run(["bash", "-n"], input=code, text=True, check=True)


# The first page


def test_the_first_page(tmp_path):
    train, load = blocks("index.md")

    def loss(told):
        return float(re.findall(r"val_loss\s+│\s+([\d.]+)", told)[0])

    trained = loss(script(tmp_path, train, "first.py"))
    assert 3 < trained < 4.5
    again = script(tmp_path, load)
    assert loss(again) == pytest.approx(trained, rel=1e-5)  # sums of four ranks, and of one
    assert "b'def __init__(self" in again
    show, fit = blocks("index.md", "bash")
    assert "stage 1  2 3" in shell(tmp_path, show)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shell(tmp_path, fit)


def test_the_readmes_first_run(tmp_path):
    """Its code, as a script; its command that sets up and tests is what CI runs first."""
    train, pretrained = blocks("../README.md")
    shorter = train.replace("max_steps=60", "max_steps=2, limit_val_batches=1")
    assert shorter != train
    script(tmp_path, shorter)
    compile(pretrained, "README.md", "exec")
    setup = "python3 -m venv .venv && .venv/bin/pip install --quiet torch==2.13.0 -e '.[dev]'"
    tests = f"{setup} && .venv/bin/python -m pytest\n"
    assert f"```bash\n{tests}```" in (ROOT / "README.md").read_text()
    assert tests in (ROOT / ".ci/run").read_text()


# Guides


def test_layouts(tmp_path, capsys):
    (show,) = blocks("layouts.md", "bash")
    shell(tmp_path, show)
    assert Image.open(tmp_path / "rank-grid.png").size[0] > 1000
    layout = names_of("layouts.md", tmp_path)["layout"]
    assert layout.dp == 2
    text = (DOCS / "layouts.md").read_text()
    assert f"```text\n{capsys.readouterr().out}```" in text
    for p, *shares in re.findall(r"^\| (\d) \| (\d+) % \| (\d+) % \| (\d+) % \| (\d+) % \|$", text, re.MULTILINE):
        p = int(p)
        waits = [(p - 1) / (v * m + p - 1) for v, m in ((1, p), (1, 4 * p), (1, 16 * p), (2, 4 * p))]
        assert [round(100 * wait) for wait in waits] == [int(share) for share in shares]


def test_pipelines(tmp_path, capsys):
    names_of("pipelines.md", tmp_path)
    assert f"```text\n{capsys.readouterr().out}```" in (DOCS / "pipelines.md").read_text()


def test_long_sequences(tmp_path):
    (code,) = blocks("long_sequences.md")
    told = script(tmp_path, code).splitlines()[-1]
    assert f"print(trainer.strategy.layout.sizes)  # {told}\n" in code


def test_latent_attention(tmp_path):
    config = names_of("latent_attention.md", tmp_path)["config"]
    assert config.latent_attention.qk_head_dim == 192


def test_experts(tmp_path):
    config = names_of("experts.md", tmp_path)["config"]
    assert config.experts.num == 8


def test_multi_token_prediction(tmp_path):
    assert names_of("multi_token_prediction.md", tmp_path)["config"].mtp == 1


def test_precision(tmp_path):
    (code,) = blocks("precision.md")
    assert script(tmp_path, code).endswith("{torch.bfloat16} {torch.float32}\n")


def test_the_bubble_is_the_same_in_text_and_picture():
    """The picture keeps its title in its file; the second number is that of the formula."""
    text = (DOCS / "monitoring.md").read_text()
    says = {"1f1b": r"here (\d+) % .*would be (\d+) %", "interleaved": r"is then (\d+) %, and (\d+) %"}
    for picture, pattern in says.items():
        title = Image.open(DOCS / f"images/timeline-{picture}.png").text["Title"]
        told = re.search(pattern, text, re.DOTALL).groups()
        assert re.findall(r"(\d+)%", title) == list(told)
        sizes = {name: int(size) for name, size in re.findall(r"(pp|vp)=(\d+)", title)}
        layout = ParallelLayout(world_size=sizes["pp"], **sizes)
        assert round(100 * ideal_bubble(layout, int(re.search(r"(\d+) micro-batches", title)[1]))) == int(told[1])


@pytest.mark.slow
def test_monitoring(tmp_path):
    (code,) = blocks("monitoring.md")
    script(tmp_path, code)
    header, *rows = (tmp_path / "watched" / "metrics.csv").read_text().splitlines()
    table = [line for line in (DOCS / "monitoring.md").read_text().splitlines() if line.startswith("| ")]
    page = {name for line in table for name in re.findall(r"`([a-z_]+)`", line.split("|")[2])}
    page -= {"val_loss", "test_loss", "val_perplexity", "test_perplexity", "loss_scale"}
    page -= {"_min", "_rank"}
    assert set(header.split(",")) >= page >= {"mfu", "grad_norm", "memory_gib"}
    times = {f"time/{phase}{part}" for phase in ("data", "compute", "save", "step") for part in ("", "_min", "_rank")}
    assert times <= set(header.split(","))
    assert len(rows) >= 4
    assert {path.name for path in (tmp_path / "timeline").iterdir()} == {"step-5.png", "step-5.json"}
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"rank-0.json", "rank-1.json"}
    callbacks = re.search(r"In YAML: `trainer.callbacks: (.*)`", (DOCS / "monitoring.md").read_text())[1]
    yaml.safe_load(callbacks)
    config = {"trainer": {"callbacks": yaml.safe_load(callbacks)}, "model": {"class_path": "GPTModule"}}
    config["model"]["init_args"] = {"config": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert "PipelineTimeline" in shell(tmp_path, "lightning-megatron fit --config run.yaml --print_config")


@pytest.mark.slow
def test_two_agents_of_torchrun(tmp_path):
    """Two on one machine stand for two machines: the page's command, with the address of this one."""
    (command,) = blocks("multi_node.md", "bash")
    recipe = yaml.safe_load((ROOT / "examples/recipes/tiny.yaml").read_text())
    recipe["trainer"] |= {"max_steps": 2, "enable_progress_bar": False, "logger": False}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    here = command.replace("10.0.0.1:29500", f"127.0.0.1:{free_port()}")
    assert here != command
    both = f"({here.strip()} ) > first 2>&1 &\n({here.strip()} ) > second 2>&1\nwait $!\n"
    shell(tmp_path, both)
    told = (tmp_path / "first").read_text() + (tmp_path / "second").read_text()
    assert told.count("4 ranks: tp=2, pp=2, dp=1 over gloo") == 1
    assert "`max_steps=2` reached" in told
    assert list((tmp_path / "checkpoints").rglob("manifest.json")) == [
        tmp_path / "checkpoints" / "epoch=0-step=2.ckpt" / "manifest.json"
    ]


def test_the_job_of_kubernetes():
    (code,) = blocks("multi_node.md", "yaml")
    service, job = yaml.safe_load_all(code)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    arguments = [argument.replace("$(JOB_COMPLETION_INDEX)", "1") for argument in container["args"]]
    given = get_args_parser().parse_args(arguments)
    assert (given.training_script, given.module) == ("lightning_megatron", True)
    assert int(given.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert given.master_addr == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert given.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert "--trainer.num_nodes=2" in given.training_script_args


@pytest.mark.alone
@pytest.mark.slow
def test_a_hang_made_on_purpose(tmp_path):
    (tmp_path / "hang.py").write_text(blocks("hangs.md")[0])
    with pytest.raises(AssertionError) as failed:
        run(tmp_path, sys.executable, str(tmp_path / "hang.py"))
    assert re.search(
        r"This rank waited in \w+, called by \w+ \(.*lightning_megatron/.*\)\. rank 1 \(pipeline stage 0,"
        r" tensor rank 1, replica 0\) is in no collective; it is in on_train_batch_start",
        str(failed.value),
    )
    time.sleep(0.5)
    left = [process for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(process.info["cmdline"])]
    assert not left


def test_each_row_of_the_parity_table_has_its_test_or_page():
    rows = re.findall(r"^\| (?!\||-)(.+) \|$", (DOCS / "parity.md").read_text(), re.MULTILINE)
    rows = [row.split(" | ") for row in rows]
    assert len(rows) > 40
    for what, *others, here, shown_by in rows:
        assert len(others) == 3, what
        assert here.strip(), what
        if test := re.fullmatch(r"`(test_\w+\.py)::(test_\w+)`", shown_by):
            assert f"\ndef {test[2]}(" in path_of_test(test[1]).read_text(), shown_by
        else:
            assert (DOCS / re.fullmatch(r"\[.+\]\((\w+\.md)\)", shown_by)[1]).is_file()


def test_the_tests_of_silent_faults_exist():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)` \|$", (DOCS / "silent_faults.md").read_text(), re.MULTILINE)
    assert len(named) > 10
    for file, test in named:
        assert f"\ndef {test}(" in path_of_test(file).read_text(), test
