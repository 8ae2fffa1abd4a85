"""No circle of imports, also where an import is for types alone; `make lint` holds the layers."""

import grimp


def test_no_circle_of_files():
    graph = grimp.build_graph("gligen_xl", exclude_type_checking_imports=False, cache_dir=None)
    imports = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    assert imports["gligen_xl.worlds"] >= {"gligen_xl.detect.detection"}  # an import for types
    while free := {module for module, others in imports.items() if not others}:
        imports = {module: others - free for module, others in imports.items() if module not in free}
    assert not imports, sorted(imports)
