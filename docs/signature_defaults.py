"""Makes the reference show the value of a default that the code names: ``Kernels()`` and not ``_DEFAULT_KERNELS``."""

from typing import Any

import griffe


class SignatureDefaults(griffe.Extension):
    """A griffe extension, which mkdocs.yml names."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Replace such defaults in all functions and classes of the package."""
        self._visit(pkg)

    def _visit(self, holder: griffe.Object) -> None:
        for member in list(holder.members.values()):
            if member.is_alias:
                continue
            if isinstance(member, griffe.Function):
                for parameter in member.parameters:
                    parameter.default = _value(member.module, parameter.default)
            if isinstance(member, griffe.Class | griffe.Module):
                self._visit(member)


def _value(module: griffe.Module, default: Any) -> Any:
    """What ``default`` stands for if it is the name of a constant of the module; otherwise itself."""
    named = module.members.get(str(default))
    return named.value if isinstance(named, griffe.Attribute) and named.value is not None else default
