"""A rule of the specification in CEL, and the rules for single values of one form."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from opd_core.api import sentences
from opd_core.api.sentences import Sentence

INDEX = "i"  # what `got` and `words` call the value of the word `index`, which is computed once


@dataclass(frozen=True)
class Cel:
    """One rule. `got` and `words` are CEL expressions; a rule with `oldSelf` is about a change."""

    at: str
    holds: str
    sentence: Sentence
    got: str
    path: str = ""  # below `at`
    words: Mapping[str, str] = field(default_factory=dict)
    where: str = ""  # template of the whole path, if the API server cannot say it

    def validation(self) -> dict[str, Any]:
        """An entry of x-kubernetes-validations."""
        template = f"{self.sentence.message} (got {{got}}); {self.sentence.remedy}"
        template = f"{self.where}: {template}" if self.where else template
        words = {**self.words, "got": self.got}
        message = formatted(template, {**words, "index": INDEX} if "index" in words else words)
        if "index" in words:  # CEL as Kubernetes has it knows no other name for a value than an item's
            message = f"[{words['index']}].map({INDEX}, {message})[0]"
        return {
            "rule": self.holds,
            "messageExpression": message,
            **({"fieldPath": f".{self.path}"} if self.path else {}),
        }


def formatted(template: str, words: Mapping[str, str]) -> str:
    """A template as a CEL expression. `format` is cheap for the API server's estimate; a sum of texts is not."""
    text, values = "", []
    for literal, name, _, _ in Formatter().parse(template):
        text += literal.replace("%", "%%")
        if name is not None:
            text += "%s"
            values.append(words[name])
    return f"{json.dumps(text, ensure_ascii=False)}.format([{', '.join(values)}])"


def quoted(expression: str) -> str:
    return f"strings.quote({expression})"


def pattern(expression: str) -> dict[str, Any]:
    """The rule for text of one form."""
    matches = f"self.matches({json.dumps(expression)})"
    return Cel("", matches, sentences.PATTERNS[expression], quoted("self")).validation()


def quantity() -> dict[str, Any]:
    """The rule for a number or a number with a unit, in cheaper words than its pattern, which the schema has as well.

    Up to Kubernetes 1.33 no maxLength bounds the estimate of what is x-kubernetes-int-or-string
    (https://github.com/kubernetes/kubernetes/pull/131977), and a pattern over three million characters is too dear.
    """
    text = "isQuantity(self) && !self.startsWith('-') && !self.startsWith('+')"
    sentence = sentences.PATTERNS[sentences.QUANTITY_PATTERN]
    return Cel("", f"type(self) == int ? self >= 0 : {text}", sentence, quoted("string(self)")).validation()


def keys(length: int, expression: str) -> list[dict[str, Any]]:
    """The rules for the keys of a map, which no schema can bound."""
    longest = f"self.filter(k, k.size() > {length})[0].size()"
    form = f"k.matches({json.dumps(expression)})"
    wrong = f"self.filter(k, k.size() <= {length} && !{form})"
    return [
        Cel("", f"self.all(k, k.size() <= {length})", sentences.LONG_KEY, longest).validation(),
        Cel("", f"{wrong}.size() == 0", sentences.PATTERNS[expression], quoted(f"{wrong}[0]")).validation(),
    ]


def first(items: str, item: str, holds: str) -> str:
    """Index of the first item for which a rule does not hold. Of truth values: texts would be too dear to compare."""
    return f"{items}.map({item}, {holds}).indexOf(false)"
