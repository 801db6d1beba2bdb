from outrider.steps import hookimpl


class Plugin:
    @hookimpl
    def outrider_step_types(self):
        return []
