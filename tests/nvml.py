"""A stand-in for pynvml with one card."""

UUID = "GPU-5f0c8f1e-0000-1111-2222-333344445555"


class NVMLError(Exception):
    pass


class Nvml:
    """`answers`: what `nvmlDeviceGet<name>` returns, or the error that it raises. Functions without an answer are
    absent, as in an old driver. `opened` counts the calls of `nvmlInit`."""

    NVMLError = NVMLError

    def __init__(self, uuid=UUID, **answers):
        self.uuid, self.opened = uuid, 0
        for name, answer in answers.items():
            setattr(self, f"nvmlDeviceGet{name}", lambda handle, *_, answer=answer: self.answer(answer))

    def answer(self, answer):
        if isinstance(answer, Exception):
            raise answer
        return answer

    def nvmlInit(self):  # noqa: N802
        self.opened += 1

    def nvmlSystemGetDriverVersion(self):  # noqa: N802
        return "580.65"

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        if uuid != self.uuid:
            raise NVMLError("Not Found")
        return uuid
