from outrider.steps import hookimpl


@hookimpl(wrapper=True)
def outrider_step_types():
    return (yield)
