"""Checks a run before it starts, on any machine: ``check_run`` in ``run_check.py`` takes its YAML file."""
