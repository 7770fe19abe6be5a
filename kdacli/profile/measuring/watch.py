"""What the GPU's clocks did while it was timed: NVML asked ten times a second, from a thread of its own."""

import contextlib
import functools
import operator
import statistics
import threading
from collections.abc import Callable, Iterator

from kdacli.device import gpu_uuid
from kdacli.profile.records.row import Clocks

INTERVAL_S = 0.1
# nvml.h, nvmlClocksEventReason*: those that slow a GPU down. Not among them: idle (0x1) and clocks that were set (0x2).
REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}
Reading = dict[str, float]


def reasons(mask: int) -> list[str]:
    """The names of what slows the GPU down, from NVML's bits."""
    return [name for bit, name in REASONS.items() if mask & bit]


class Watch:
    """Reads the clocks in the background while a case is timed. A reading that fails is left out.

    Attributes:
        read: one reading of sm_mhz, memory_mhz, power_w, temperature_c and throttle (NVML's bits).
        lost: why a reading failed; None while none did.
    """

    def __init__(self, read: Callable[[], Reading], interval_s: float = INTERVAL_S) -> None:
        self.read, self.interval_s = read, interval_s
        self.lost: str | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[list[Reading]]:
        """Yields the list that readings are put into: one at least, taken at the end, unless reading fails."""
        readings: list[Reading] = []
        done = threading.Event()

        def take() -> None:
            try:
                readings.append(self.read())
            except Exception as error:  # of the driver: no fault of what is timed
                self.lost = f"clocks were not always watched: NVML says {error}"

        def loop() -> None:
            while not done.wait(self.interval_s):
                take()

        thread = threading.Thread(target=loop, name="kda-clocks", daemon=True)
        thread.start()
        try:
            yield readings
        finally:
            done.set()
            thread.join()
            take()


def summary(readings: list[Reading]) -> Clocks | None:
    """None for no readings."""
    if not readings:
        return None
    sm, memory = ([r[key] for r in readings] for key in ("sm_mhz", "memory_mhz"))
    mask = functools.reduce(operator.or_, (int(r["throttle"]) for r in readings))
    power, heat = (max(r[key] for r in readings) for key in ("power_w", "temperature_c"))
    return Clocks(_span(sm), _span(memory), power, heat, reasons(mask), len(readings))


def _span(clock: list[float]) -> list[float]:
    return [min(clock), statistics.median(clock), max(clock)]


def nvml_reader() -> tuple[Callable[[], Reading] | None, str | None]:
    """What reads the clocks of the GPU in use, or None and why it cannot be read."""
    try:
        import pynvml
    except ImportError:
        return None, "clocks were not watched: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(gpu_uuid())
        events = getattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        events = events or pynvml.nvmlDeviceGetCurrentClocksThrottleReasons  # its name before driver 535

        def read() -> Reading:
            return {
                "sm_mhz": float(pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM)),
                "memory_mhz": float(pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM)),
                "power_w": pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
                "temperature_c": float(pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU)),
                "throttle": float(events(gpu)),
            }

        read()
    except (pynvml.NVMLError, AttributeError) as error:
        return None, f"clocks were not watched: NVML says {error}"
    return read, None
