from experiments.fuzz_frames import MAX_GROWTH_BYTES, fuzz


def test_mutated_frames_give_messages_or_frame_errors_in_bounded_memory():
    report = fuzz(20_000, seed=1)
    assert not report.failures
    assert report.growth_bytes < MAX_GROWTH_BYTES
    assert report.worst_allocation <= 1
    # The mutations reach past the prefix and its checksum: messages come out too, and not only those.
    assert min(report.outcomes[outcome] for outcome in ("message", "waiting", "FrameError", "IntegrityError")) > 100
