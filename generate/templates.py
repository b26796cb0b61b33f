"""Task templates: versioned files of jinja2 text. A prompt's version is its template's name and the hash of its content, so
that an edited template gives other prompts, under other ids.

Rendered in jinja2's immutable sandbox, because a template may come from somebody else. The texts that fill it are values:
what looks like a template inside a source file stays as it is.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from configs.errors import UnusableInput
from data.records import digest
from generate.sources.paths import find_file

SHIPPED = Path(__file__).parent / "templates"
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False
)


@dataclass(frozen=True)
class Template:
    """A template's name (file name without suffix) and text. Variables that nobody fills are refused, never left empty."""

    name: str
    text: str

    @property
    def version(self) -> str:
        return f"{self.name}@{digest(self.text, size=4)}"

    @cached_property
    def variables(self) -> frozenset[str]:
        """The variables that rendering needs. Raises UnusableInput where the template is no jinja2."""
        with self._complaints():
            return frozenset(jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(self.text)))

    @cached_property
    def _compiled(self) -> jinja2.Template:
        with self._complaints():
            return _ENVIRONMENT.from_string(self.text)

    def require(self, known: Collection[str]) -> "Template":
        """Itself, when every variable is known. Raises UnusableInput that names the first one that is not."""
        if unknown := sorted(self.variables - set(known)):
            raise UnusableInput(
                f"template {self.name}: unknown variable {unknown[0]!r}; known variables: {', '.join(sorted(known))}"
            )
        return self

    def render(self, values: Mapping[str, object]) -> str:
        """Raises UnusableInput for an undefined variable or anything else that the template cannot do with these values."""
        with self._complaints():
            return self._compiled.render(values)

    def render_block(self, block: str, values: Mapping[str, object]) -> str:
        """One `{% block NAME %}` of the template, without the whitespace around it. Raises UnusableInput."""
        if block not in self._compiled.blocks:
            raise UnusableInput(f"template {self.name}: no block {block!r}; expected {{% block {block} %}}")
        with self._complaints():
            return "".join(self._compiled.blocks[block](self._compiled.new_context(dict(values)))).strip()

    @contextmanager
    def _complaints(self) -> Iterator[None]:
        try:
            yield
        except jinja2.TemplateSyntaxError as error:
            raise UnusableInput(f"template {self.name} line {error.lineno}: {_line(error)}; expected jinja2 text") from error
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise UnusableInput(f"template {self.name}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def load_template(name: str, folders: Sequence[Path]) -> Template:
    """A shipped template by its name, or the file at a path (anything with a slash or a suffix) beside the recipe.

    Raises:
        UnusableInput: no such template, or one that is not UTF-8.
    """
    path = template_path(name, folders)
    try:
        return Template(path.stem, path.read_bytes().decode())
    except (UnicodeDecodeError, OSError) as error:
        raise UnusableInput(f"template {name}: {_line(error)}; expected a readable UTF-8 file") from error


def template_path(name: str, folders: Sequence[Path]) -> Path:
    """Raises UnusableInput when there is no such template."""
    if "/" in name or Path(name).suffix:
        return find_file(name, folders, "template")
    path = SHIPPED / f"{name}.md"
    if not path.is_file():
        shipped = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.md")))
        raise UnusableInput(f"template {name}: no shipped template of that name ({shipped}); an own one is named by its path")
    return path
