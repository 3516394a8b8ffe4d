"""A run that works, with what to change in it, and the message that a wrong one ends with."""

BASE = {
    "task": {"name": "wine", "model": "linear"},
    "oracle": {"name": "backprop", "batch_size": 8},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "algorithm": {"name": "dsgd"},
    "topology": {"name": "ring"},
    "ranks": 4,
    "steps": 4,
}


def assert_one_message(status, err, words):
    assert status == 2, err
    assert err.startswith("gossamer: error: "), err
    assert err.count("gossamer: error:") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err, f"{word!r} is not in {err!r}"


def changed(**sections):
    """Return the run with fields changed: a dict merges into its section, None drops the field."""
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in BASE.items()}
    for key, value in sections.items():
        if value is None:
            values.pop(key, None)
        elif isinstance(value, dict) and isinstance(values.get(key), dict) and "name" not in value:
            values[key] |= value
        else:
            values[key] = value
    return values
