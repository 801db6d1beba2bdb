from outrider.steps import hookimpl


@hookimpl
def outrider_step_types():
    return 5
