# SPDX-License-Identifier: Apache-2.0
"""`pretrained run --input --output`: every line is answered once, whatever happens to the program."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from pretrained.cli.answers import AnswerFile, InputState, read_questions
from pretrained.cli.main import main
from pretrained.errors import ArgumentError, FileError


def write_lines(file, values):
    file.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def read_lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    write_lines(file, [{"prompt": f"question {number}"} for number in range(1, 7)])
    return file


def answer(answers, prompts, count):
    """Answer the next lines without a model."""
    for question in read_questions(prompts):
        if count and question.line not in answers.done:
            answers.add(question.answered(answer=f"of {question.line}", num_tokens=2, finish="stop"))
            count -= 1


# -- questions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"prompt": "fine"}', None),
        (b'{"messages": [{"role": "user", "content": "fine"}]}', None),
        (b"word", "not JSON: Expecting value (column 1)"),
        (b'{"prompt": "\xff"}', "not UTF-8 (byte 12 of the line)"),
        (b"[1]", "not a JSON object but a list"),
        (b"3", "not a JSON object but a number"),
        (b"{}", 'needs "prompt" or "messages", and has neither'),
        (b'{"prompt": "a", "messages": []}', 'needs "prompt" or "messages", and has both'),
        (b'{"prompt": ["a"]}', '"prompt" must be a text, not a list'),
        (b'{"prompt": "  "}', '"prompt" is empty'),
        (b'{"messages": "a"}', '"messages" must be a list of {"role": ..., "content": ...}'),
        (b'{"messages": [{"content": "a"}]}', '"messages" must be a list of {"role": ..., "content": ...}'),
        (b"[" * 100_000, "not JSON that can be read: nested too deeply"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_with_a_line(tmp_path, line, fault):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b"\n" + line + b"\n\n")
    (question,) = read_questions(file)
    assert (question.line, question.fault) == (2, fault)


def test_an_answer_carries_what_came_with_the_question(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "id": "x", "n": [1], "answer": "gold", "seed": 3}')
    (question,) = read_questions(file)
    assert question.settings == {"seed": 3}
    assert question.answered(answer="mine") == {
        "line": 1, "id": "x", "prompt": "a", "n": [1], "input_answer": "gold", "seed": 3, "answer": "mine",
    }  # fmt: skip


# -- answers ----------------------------------------------------------------------------------------


def test_a_run_goes_on_where_the_last_one_ended(tmp_path, prompts):
    out = tmp_path / "answers.jsonl"
    first = AnswerFile(out, prompts, {"model": "m"})
    answer(first, prompts, 2)
    first.close()
    again = AnswerFile(out, prompts, {"model": "m"})
    assert again.done == {1, 2}
    answer(again, prompts, 9)
    again.close()
    assert [line["line"] for line in read_lines(out)] == [1, 2, 3, 4, 5, 6]


def test_a_piece_of_a_line_is_cut_off(tmp_path, prompts):
    out = tmp_path / "answers.jsonl"
    first = AnswerFile(out, prompts, {})
    answer(first, prompts, 3)
    first.close()
    whole = out.read_bytes()
    starts = [0, *(index + 1 for index, byte in enumerate(whole) if byte == 10)]
    for length in range(len(whole)):
        out.write_bytes(whole[:length])
        again = AnswerFile(out, prompts, {})
        done = sum(start <= length for start in starts[1:])
        assert again.done == set(range(1, done + 1))
        again.close()
        assert out.read_bytes() == whole[: starts[done]]


def test_a_damaged_line_in_the_middle_is_told(tmp_path, prompts):
    out = tmp_path / "answers.jsonl"
    first = AnswerFile(out, prompts, {})
    answer(first, prompts, 3)
    first.close()
    lines = out.read_bytes().splitlines(keepends=True)
    lines[1] = b"\0" * 20 + b"\n"
    out.write_bytes(b"".join(lines))
    with pytest.raises(FileError, match=r"damaged \(.*answers.jsonl:2\).*answered again"):
        AnswerFile(out, prompts, {})
    assert out.read_bytes() == b"".join(lines)


def test_a_changed_input_is_noticed_and_more_lines_are_fine(tmp_path, prompts):
    out = tmp_path / "answers.jsonl"
    first = AnswerFile(out, prompts, {})
    answer(first, prompts, 2)
    first.close()
    with prompts.open("a", encoding="utf-8") as stream:
        stream.write('{"prompt": "one more"}\n')
    AnswerFile(out, prompts, {}).close()
    assert json.loads((tmp_path / "answers.jsonl.run.json").read_text())["size"] == prompts.stat().st_size
    text = prompts.read_text(encoding="utf-8")
    for changed in (text.replace("question 2", "question 9"), text[:-30], ""):
        prompts.write_text(changed, encoding="utf-8")
        with pytest.raises(FileError, match=r"The input has changed .*Choose another --output"):
            AnswerFile(out, prompts, {})
    prompts.write_text(text, encoding="utf-8")
    AnswerFile(out, prompts, {}).close()


def test_other_settings_are_noticed(tmp_path, prompts):
    out = tmp_path / "answers.jsonl"
    AnswerFile(out, prompts, {"model": "a", "top_k": 3}, {"seed": 5}).close()
    going_on = AnswerFile(out, prompts, {"model": "a", "top_k": 3}, {"seed": 6})
    assert going_on.settings["seed"] == 5
    going_on.close()
    for settings in ({"model": "b", "top_k": 3}, {"model": "a"}, {"model": "a", "top_k": 3, "seed": 7}):
        with pytest.raises(ArgumentError, match=r"begun with another (model|top_k|seed).*same settings"):
            AnswerFile(out, prompts, settings, {"seed": 6})


def test_files_that_are_something_else_are_left_alone(tmp_path, prompts):
    out = tmp_path / "answers.jsonl"
    out.write_text("mine\n", encoding="utf-8")
    with pytest.raises(FileError, match="nothing tells that it is this input's answers"):
        AnswerFile(out, prompts, {})
    assert out.read_text(encoding="utf-8") == "mine\n"
    (tmp_path / "answers.jsonl.run.json").write_text('{"size": 3}', encoding="utf-8")
    with pytest.raises(FileError, match="record of these answers cannot be read"):
        AnswerFile(out, prompts, {})
    with pytest.raises(ArgumentError, match="would overwrite the input"):
        AnswerFile(prompts, prompts, {})
    with pytest.raises(FileError, match="No such file"):
        AnswerFile(tmp_path / "nowhere" / "answers.jsonl", prompts, {})
    with pytest.raises(FileError, match="Is a directory"):
        AnswerFile(tmp_path, prompts, {})


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_two_runs_do_not_share_a_file(tmp_path, prompts):
    first = AnswerFile(tmp_path / "answers.jsonl", prompts, {})
    with pytest.raises(FileError, match="Another run is adding to these answers"):
        AnswerFile(tmp_path / "answers.jsonl", prompts, {})
    first.close()
    AnswerFile(tmp_path / "answers.jsonl", prompts, {}).close()


def test_a_full_disk_leaves_whole_lines(tmp_path, prompts, monkeypatch):
    out = tmp_path / "answers.jsonl"
    answers = AnswerFile(out, prompts, {})
    answer(answers, prompts, 1)
    write = os.write

    def half(descriptor, data):
        if len(data) < 30:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:20])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(FileError, match="No space left on device"):
        answer(answers, prompts, 1)
    monkeypatch.undo()
    answers.close()
    assert [line["line"] for line in read_lines(out)] == [1]


def test_any_text_can_be_answered(tmp_path, prompts):
    out = tmp_path / "answers.jsonl"
    answers = AnswerFile(out, prompts, {})
    answers.add({"line": 1, "answer": "ü\u2028\ud800\n"})
    answers.close()
    again = AnswerFile(out, prompts, {})
    assert again.done == {1}
    again.close()


_ANSWER_SLOWLY = """
import sys, time
from pathlib import Path
from pretrained.cli.answers import AnswerFile, read_questions
prompts, out = map(Path, sys.argv[1:])
answers = AnswerFile(out, prompts, {})
print("begun", flush=True)
for question in read_questions(prompts):
    if question.line not in answers.done:
        answers.add(question.answered(answer="x" * (question.line * 7919 % 200_000)))
        time.sleep(0.002)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
def test_a_program_that_is_killed_loses_nothing_and_repeats_nothing(tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    write_lines(prompts, [{"prompt": str(number)} for number in range(250)])
    chance, kills = random.Random(3), 0
    for _ in range(60):
        program = subprocess.Popen(
            [sys.executable, "-c", _ANSWER_SLOWLY, str(prompts), str(out)], stdout=subprocess.PIPE
        )
        program.stdout.readline()
        time.sleep(chance.random() * 0.2)
        program.send_signal(signal.SIGKILL)
        if program.wait() == 0:
            break
        kills += 1
        program.stdout.close()
    program.stdout.close()
    assert kills > 2
    assert [line["line"] for line in read_lines(out)] == list(range(1, 251))


# -- the command ------------------------------------------------------------------------------------


def words(prompts, out, *more, model="nowhere"):
    return ["run", str(model), "--input", str(prompts), "--output", str(out), *more]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--input", "a"], "--input needs --output"),
        (["--output", "a"], "--output needs --input"),
        (["hello", "--input", "a", "--output", "b"], "A PROMPT and --input are two ways to ask"),
        (["--input", "absent.jsonl", "--output", "b"], "No such file"),
    ],
)
def test_arguments_that_do_not_go_together(capsys, monkeypatch, tmp_path, more, message):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "nowhere", *more]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "b").exists()


def test_strict_reads_all_lines_before_anything_is_loaded(capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\noops\n{"prompt": 3}\n', encoding="utf-8")
    assert main(words(prompts, tmp_path / "answers.jsonl", "--strict")) == 1
    text = capsys.readouterr().err
    assert f"{prompts}:2: not JSON" in text and f"{prompts}:3: " in text
    assert "2 of 3 lines cannot be used" in text
    assert not (tmp_path / "answers.jsonl").exists()
    prompts.write_text("\n", encoding="utf-8")
    assert main(words(prompts, tmp_path / "answers.jsonl")) == 1
    assert "There are no prompts" in capsys.readouterr().err


@pytest.mark.realweights
@pytest.mark.slow
def test_a_file_of_prompts_is_answered(capsys, tmp_path, smollm2_gguf):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    write_lines(
        prompts,
        [
            {"prompt": "What is the capital of France?", "topic": "geography"},
            {"id": "m", "messages": [{"role": "user", "content": "Say hi."}], "max_new_tokens": 3},
            {"prompt": "a", "max_new_tokens": "many"},
            {"prompt": "Count.", "stop_strings": "2"},
        ],
    )
    assert main(words(prompts, out, "--max-new-tokens", "12", model=smollm2_gguf)) == 0
    found = {line["id"]: line for line in read_lines(out)}
    assert sorted(map(str, found)) == ["1", "3", "4", "m"]
    assert "Paris" in found[1]["answer"] and found[1]["topic"] == "geography"
    assert found[1]["finish"] == "stop"
    assert (found["m"]["num_tokens"], found["m"]["finish"]) == (3, "length")
    assert "max_new_tokens cannot be 'many'" in found[3]["error"]
    text = capsys.readouterr().err
    assert f"{prompts}:3: GenerationError" in text
    assert "4 of 4 lines answered, 1 of them with an error" in text
    # The answer is that of one prompt alone.
    assert main(["run", str(smollm2_gguf), "What is the capital of France?", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out.strip() == found[1]["answer"]
    # Nothing is left to do, so nothing is loaded.
    assert main(words(prompts, out, "--max-new-tokens", "12", model=smollm2_gguf)) == 0
    assert capsys.readouterr().err == "(all 4 lines are answered already)\n"
    assert main(words(prompts, out, "--raw", "--max-new-tokens", "12", model=smollm2_gguf)) == 1
    assert "begun with another raw" in capsys.readouterr().err
    # A conversation needs a template; with --strict the first such line ends the run.
    other = tmp_path / "other.jsonl"
    assert main(words(prompts, other, "--raw", "--strict", model=smollm2_gguf)) == 1
    assert "line cannot be answered: Messages are for a chat" in " ".join(capsys.readouterr().err.split())


@pytest.mark.realweights
@pytest.mark.slow
def test_sampled_answers_do_not_depend_on_interruptions(capsys, tmp_path, smollm2_gguf):
    prompts = tmp_path / "prompts.jsonl"
    write_lines(prompts, [{"prompt": f"Say something about {what}."} for what in ("dogs", "cats", "rain")])
    more = ["--temperature", "0.9", "--max-new-tokens", "6", "--quiet", "--seed", "4"]
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert main(words(prompts, whole, *more, model=smollm2_gguf)) == 0
    assert main(words(prompts, part, *more, model=smollm2_gguf)) == 0
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(lines[0] + lines[1][:30])
    assert main(words(prompts, part, *more, "--rows", "1", model=smollm2_gguf)) == 0
    expected = {line["line"]: line["answer"] for line in read_lines(whole)}
    assert {line["line"]: line["answer"] for line in read_lines(part)} == expected
    assert capsys.readouterr().err == ""


def test_the_state_of_a_file_is_its_bytes(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"abc" * 500_000)
    assert InputState.of(file) == InputState.of(file, 1_500_000)
    assert InputState.of(file, 3).size == 3


@pytest.mark.realweights
@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
def test_the_command_is_killed_again_and_again(tmp_path, smollm2_gguf):
    prompts, out, whole = (tmp_path / name for name in ("prompts.jsonl", "answers.jsonl", "whole.jsonl"))
    write_lines(prompts, [{"prompt": f"Say {number}.", "n": number} for number in range(40)])
    more = ["--max-new-tokens", "16", "--rows", "4", "--quiet", "--dtype", "float32"]
    chance, kills = random.Random(1), 0
    command = [sys.executable, "-m", "pretrained.cli.main"]
    while True:
        program = subprocess.Popen([*command, *words(prompts, out, *more, model=smollm2_gguf)])
        try:
            assert program.wait(2 + 8 * chance.random()) == 0
            break
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()
            kills += 1
    assert kills
    assert main(words(prompts, whole, *more, model=smollm2_gguf)) == 0
    found = read_lines(out)
    assert sorted(line["line"] for line in found) == list(range(1, 41))
    expected = {line["line"]: line for line in read_lines(whole)}
    assert {line["line"]: line for line in found} == expected
