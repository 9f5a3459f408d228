"""The ranks of a machine write into one file how they failed, and one of them alone puts the summary into its head."""

import fcntl
import os
import threading
import time

from lightning_megatron.distributed.crash_report import CrashFile, Failure

FAILURE = Failure("rank 1 (pipeline stage 0)", 4, "RuntimeError: no", 'File "train.py", line 3, in f')


def test_the_first_to_write_tells(tmp_path):
    file = CrashFile(tmp_path, time.time())
    assert file.add(FAILURE, "\nRank 1\n") == FAILURE.summary(file.path)
    assert file.add(FAILURE, "\nRank 0\n") is None
    assert file.read_summary() == FAILURE.summary(file.path)
    assert file.path.read_text().endswith("\nRank 1\n\nRank 0\n")


def test_a_rank_that_waits_for_the_file_does_not_tell_again(tmp_path):
    file, told = CrashFile(tmp_path, time.time()), []
    with file.path.open("a") as other_rank:
        fcntl.flock(other_rank, fcntl.LOCK_EX)
        rank = threading.Thread(target=lambda: told.append(file.add(FAILURE, "\nRank 1\n")))
        rank.start()
        time.sleep(0.3)  # the rank has opened the file, which is empty, and waits
        other_rank.write(FAILURE.summary(file.path) + "\n\n")
    rank.join()
    assert told == [None]


def test_the_file_of_an_earlier_run_is_written_anew(tmp_path):
    file = CrashFile(tmp_path, time.time())
    file.path.write_text("the summary of another run\n\n")
    os.utime(file.path, (0, 0))
    assert file.read_summary() is None
    assert file.add(FAILURE, "\nRank 1\n") == FAILURE.summary(file.path)
    assert "another run" not in file.path.read_text()
