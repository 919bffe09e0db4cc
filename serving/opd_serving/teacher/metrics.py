"""What a teacher server exports beside Triton's own series; Triton makes the metrics (`backend.py`)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """`kind`: counter or gauge."""

    name: str
    kind: str
    meaning: str


LOADS = Metric("opd_teacher_adapter_loads_total", "counter", "LoRAs loaded into the model's memory.")
DROPS = Metric("opd_teacher_adapter_drops_total", "counter", "LoRAs dropped from there to make room for others.")
RESIDENT = Metric("opd_teacher_adapters", "gauge", "LoRAs in the model's memory.")
METRICS = (LOADS, DROPS, RESIDENT)
