"""Dashboards as Grafana imports them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_COLUMNS, _HEIGHT = 24, 8
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}

Draw = tuple[str, str]  # query, legend


@dataclass(frozen=True)
class Panel:
    title: str
    draws: Sequence[Draw]
    unit: str  # one of Grafana's
    kind: str  # one of its panel types
    stacked: bool
    logarithmic: bool
    named: bool  # the legend is what there is to read


@dataclass(frozen=True)
class Dashboard:
    """`variables`: name -> query for the values that a reader chooses from. `rows`: (heading or "", panels)."""

    name: str
    title: str
    variables: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, Sequence[Panel]]]


def panel(
    title: str,
    *draws: Draw,
    unit: str = "short",
    kind: str = "timeseries",
    stacked: bool = False,
    logarithmic: bool = False,
    named: bool = False,
) -> Panel:
    return Panel(title, draws, unit, kind, stacked, logarithmic, named)


def row(heading: str, *panels: Panel) -> tuple[str, Sequence[Panel]]:
    return heading, panels


def render(dashboard: Dashboard) -> dict[str, Any]:
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    return {
        "uid": f"opd-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["diffusion-opd"],
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "graphTooltip": 1,
        "templating": {"list": [source, *(_variable(name, query) for name, query in dashboard.variables)]},
        "panels": list(_panels(dashboard)),
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {"name": name, "type": "query", "query": query, "datasource": _SOURCE, "refresh": 2, "sort": 1}


def _panels(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    number = top = 0
    for heading, panels in dashboard.rows:
        if heading:
            number += 1
            grid = {"x": 0, "y": top, "w": _COLUMNS, "h": 1}
            yield {"id": number, "type": "row", "title": heading, "collapsed": False, "panels": [], "gridPos": grid}
            top += 1
        left = 0
        for index, each in enumerate(panels):
            number += 1
            right = _COLUMNS * (index + 1) // len(panels)
            yield _panel(each, number, {"x": left, "y": top, "w": right - left, "h": _HEIGHT})
            left = right
        top += _HEIGHT


def _panel(panel: Panel, number: int, grid: dict[str, int]) -> dict[str, Any]:
    field: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "gauge":
        field |= {"min": 0, "max": 1}
    custom: dict[str, Any] = {}
    if panel.stacked:
        custom |= {"stacking": {"mode": "normal"}, "fillOpacity": 20}
    if panel.logarithmic:
        custom |= {"scaleDistribution": {"type": "log", "log": 10}}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "datasource": _SOURCE,
        "gridPos": grid,
        "fieldConfig": {"defaults": {**field, "custom": custom}, "overrides": []},
        "options": {"textMode": "name"} if panel.named else {},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend}
            for index, (query, legend) in enumerate(panel.draws)
        ],
    }
