"""The commands of ``lightning-megatron`` but for those that train: a file for each, ``NAME_command.py``.

``add_arguments`` gives a parser the command's arguments, and ``run`` does what they say. What is heavy is imported when
a command runs, so that ``--help`` and light commands answer at once.
"""
