from outrider.steps import hookimpl


@hookimpl
async def outrider_step_types():
    return []
