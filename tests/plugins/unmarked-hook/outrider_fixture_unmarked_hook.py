def outrider_step_types():
    return []
