"""Make of a Metal source what clang compiles and the engine runs.

    python reflect.py CLANG FLAGS... -- SOURCE.metal OUTPUT.cpp

C++ has no attributes like `[[buffer(0)]]`: a Metal compiler keeps them beside the code, as what binds
a shader's parameters. So they are taken out here, after the preprocessor, and made into a table of
the shaders under their host names, each with a call that asks for every argument where its
attribute says. The rest of the source is passed on as it is, if it has what a C++ compiler would not
miss: an address space for each pointer and reference among the parameters of functions, and for each
constant outside of them.
"""

import re
import subprocess
import sys

BUILTINS = {
    "threadgroup_position_in_grid": "simt::block_index()",
    "threadgroups_per_grid": "simt::num_blocks()",
    "thread_position_in_threadgroup": "simt::thread_index()",
    "threads_per_threadgroup": "simt::num_threads()",
    "simdgroup_index_in_threadgroup": "simt::thread_index() / simt::kWarpSize",
    "simdgroups_per_threadgroup": "simt::num_threads() / simt::kWarpSize",
    "thread_index_in_simdgroup": "simt::thread_index() % simt::kWarpSize",
}

# What a parameter of each attribute may be.
SPACES = {name: "uint|ushort" for name in BUILTINS} | {
    "buffer": r"(device|constant)\b[^*&]*\*|constant\b[^*&]*&",
    "threadgroup": r"threadgroup\b[^*&]*\*",
}

KERNEL = re.compile(
    r"(template\s*<[^>]*>\s*)?\[\[kernel\]\]\s*void\s+(\w+)\s*\((.*?)\)\s*\{", re.DOTALL
)
# At the start of a line, where no statement is.
FUNCTION = re.compile(r"^(?! )[^;{}#]*?\b(\w+)\(((?:[^()]|\([^()]*\))*)\)\s*\{", re.MULTILINE)
ADDRESS_SPACE = r"\b(device|constant|threadgroup|thread)\b"
PARAMETER = re.compile(r"(.+?)\w+\s*\[\[\s*(\w+)\s*(?:\((.*)\))?\s*\]\]", re.DOTALL)
INSTANTIATION = re.compile(
    r"template\s*\[\[host_name\(([^)]*)\)\]\]\s*\[\[kernel\]\]\s*decltype\((\w+<[^>]*>)\)\s*(\w+<[^>]*>);"
)


def main():
    *compile_command, _, source, output = sys.argv[1:]
    preprocess = [*compile_command, "-DMETAL_REFLECTING", "-E", "-x", "c++", source]
    text = subprocess.run(preprocess, check=True, stdout=subprocess.PIPE, text=True).stdout

    # As far as the compiler's pragmas go. Metal's default is fast math.
    text = text.replace("#pragma METAL fp math_mode(safe)", "#pragma float_control(precise, on)")
    text = text.replace("#pragma METAL fp contract(off)", "#pragma clang fp contract(off)")

    definitions = KERNEL.findall(text)
    kernels = {name: parse(name, parameters) for _, name, parameters in definitions}
    # What to call, by the name that the host knows it by.
    functions = {name: name for template, name, _ in definitions if not template}
    instantiations = INSTANTIATION.findall(text)
    for literals, function, instantiated in instantiations:
        if function != instantiated:
            sys.exit(f"error: {literals}: instantiates {instantiated} as a {function}")
        name = "".join(re.findall(r'"(.*?)"', literals))
        expected = "_".join(re.findall(r"\w+", function))
        if name != expected:
            sys.exit(f"error: {function} has the host name {name}, not {expected}")
        if name in functions:
            sys.exit(f"error: there are two functions called {name}")
        functions[name] = function
    if text.count("[[host_name") != len(instantiations):
        sys.exit("error: there is an instantiation that isn't understood")
    for function, parameters in FUNCTION.findall(text):
        for parameter in re.split(r",(?![^<]*>)", parameters):
            if re.search("[&*]", parameter) and not re.search(ADDRESS_SPACE, parameter):
                sys.exit(f"error: {function}: `{parameter.strip()}` has no address space")
    for constant in re.findall(
        r"^(?:(?:static|inline|const|constexpr) )+[^(]*?=", text, re.MULTILINE
    ):
        sys.exit(
            f"error: `{constant}`: outside of functions it must be in the constant address space"
        )

    lines = ["#include <metal_stdlib>", re.sub(r"\[\[.*?\]\]", "", text, flags=re.DOTALL)]
    lines += [f"#undef {word}" for word in ("device", "constant", "thread", "threadgroup")]
    lines.append("#ifndef METAL_ADDRESS_SPACES")
    entries = []
    for i, (name, function) in enumerate(functions.items()):
        arguments, buffers, takes_memory = kernels[function.partition("<")[0]]
        takes_turns = BUILTINS["threadgroups_per_grid"] in arguments
        lines.append(f"SIMT_HOST static void run{i}(const void*) {{ {function}({arguments}); }}")
        mask = " | ".join(f"uint64_t{{1}} << {index}" for index in buffers)
        flags = f"{takes_memory}, {takes_turns}".lower()
        entries.append(f'  {{"{name}", run{i}, {mask}, {flags}}},')
    lines += ["static const simt_metal::Shader shaders[] = {", *entries, "};"]
    lines += [f"static const int added = simt_metal::add_shaders(shaders, {len(entries)});"]
    lines += ["#endif", ""]
    with open(output, "w") as file:
        file.write("\n".join(lines))


def parse(kernel, text):
    """A kernel's parameters: the arguments of a call, its buffers' indices, if it takes memory."""
    arguments, buffers, takes_memory = [], [], False
    for parameter in re.split(r",(?![^<]*>)", text):
        match = PARAMETER.fullmatch(parameter.strip())
        if match is None:
            sys.exit(f"error: {kernel}: the parameter `{parameter.strip()}` has no attribute")
        kind, attribute, index = (group and group.strip() for group in match.groups())
        if (space := SPACES.get(attribute)) is None:
            sys.exit(f"error: {kernel}: the engine doesn't know the attribute {attribute}")
        if not re.fullmatch(space, kind):
            sys.exit(f"error: {kernel}: {attribute} can't be a `{kind}`")
        if attribute in BUILTINS:
            arguments.append(BUILTINS[attribute])
        elif attribute == "buffer":
            buffers.append(index)
            form = "reference" if "&" in kind else "pointer"
            arguments.append(f"simt_metal::buffer_{form}({index})")
        else:
            takes_memory = True
            arguments.append(f"simt_metal::threadgroup_pointer({index})")
    if len(set(buffers)) != len(buffers):
        sys.exit(f"error: {kernel}: two parameters with one buffer index")
    return ", ".join(arguments), buffers, takes_memory


if __name__ == "__main__":
    main()
