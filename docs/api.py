"Pages that describe the modules, from their source: signatures, docstrings, parameters with their comments."
import ast
import io
import re
import tokenize

ORDER = ('', 'data', 'fast', 'extensions', 'deploy', 'baselines', 'lab')


def escaped(text):
    "Text that Markdown shows as it is; code in backticks stays code."
    parts = re.split(r'(`[^`\n]*`)', text)
    parts[::2] = [re.sub(r'([\\*_<$\[\]#])', r'\\\1', part) for part in parts[::2]]
    return ''.join(parts)


def table(rows, head):
    "Rows as a Markdown table, without columns that are empty."
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [head, ['---'] * len(head), *rows]
    def cell(text): return ' '.join(text.split()).replace('|', '\\|')
    return '\n'.join('| ' + ' | '.join(cell(line[i]) for i in kept) + ' |' for line in lines) + '\n'


def code(node):
    "An expression as code; empty where there is none."
    return f'`{ast.unparse(node)}`' if node else ''


def comments_of(text):
    "Number of a line → its comment, as docments writes them."
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0]: t.string.lstrip('# ') for t in tokens if t.type == tokenize.COMMENT}


def parameters(function, comments):
    "Name, type, default and comment of each parameter, and of what is returned."
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    found = list(zip(plain, [None] * (len(plain) - len(a.defaults)) + a.defaults, [''] * len(plain)))
    found += [(a.vararg, None, '*')] * bool(a.vararg)
    found += zip(a.kwonlyargs, a.kw_defaults, [''] * len(a.kwonlyargs))
    found += [(a.kwarg, None, '**')] * bool(a.kwarg)
    rows = [(f'`{stars}{p.arg}`', code(p.annotation), code(default), escaped(comments.get(p.end_lineno, '')))
            for p, default, stars in found if p.arg not in ('self', 'cls')]
    body = function.body[0].lineno
    returned = next((comments[i] for i in range(body - 1, function.lineno - 1, -1)
                     if i in comments and i not in {p.end_lineno for p, *_ in found}), '')
    if function.returns and (returned or ast.unparse(function.returns) not in ('None', 'Self')):
        rows.append(('*returns*', code(function.returns), '', escaped(returned)))
    return rows


def signature(function, name):
    "How a function is called: on one line, or one parameter per line if it is long."
    a, calls = function.args, []
    plain = [*a.posonlyargs, *a.args]
    for p, default in zip(plain, [None] * (len(plain) - len(a.defaults)) + a.defaults):
        calls.append(p.arg + (f'={ast.unparse(default)}' if default else ''))
    if a.vararg or a.kwonlyargs: calls.append('*' + (a.vararg.arg if a.vararg else ''))
    for p, default in zip(a.kwonlyargs, a.kw_defaults):
        calls.append(p.arg + (f'={ast.unparse(default)}' if default else ''))
    if a.kwarg: calls.append(f'**{a.kwarg.arg}')
    if calls and calls[0] in ('self', 'cls'): calls = calls[1:]
    line = f'{name}({", ".join(calls)})'
    if len(line) > 88: line = f'{name}(\n    ' + ',\n    '.join(calls) + ',\n)'
    return f'```python\n{line}\n```\n'


def described(function, name, comments, level):
    "A function or method: heading, signature, docstring, parameters."
    yield f'{"#" * level} {escaped(name)}\n'
    yield signature(function, name)
    yield escaped(ast.get_docstring(function) or '') + '\n'
    if rows := parameters(function, comments): yield table(rows, ['parameter', 'type', 'default', 'meaning'])


def fields(cls, comments):
    "Annotated fields of a class: name, type, default, meaning."
    for node in cls.body:
        if not isinstance(node, ast.AnnAssign) or node.target.id.startswith('_'): continue
        default, words = node.value, comments.get(node.end_lineno, '')
        if isinstance(default, ast.Call) and getattr(default.func, 'id', '') == 'setting':
            default, words = default.args[0], ast.literal_eval(default.args[1])
        yield f'`{node.target.id}`', code(node.annotation), code(default), escaped(words)


def described_class(cls, comments):
    "A class: docstring, fields, constructor, public methods."
    bases = ', '.join(map(ast.unparse, cls.bases))
    yield f'## {escaped(cls.name)}\n'
    yield f'```python\nclass {cls.name}' + (f'({bases})' if bases else '') + '\n```\n'
    yield escaped(ast.get_docstring(cls) or '') + '\n'
    if rows := list(fields(cls, comments)): yield table(rows, ['field', 'type', 'default', 'meaning'])
    methods = [node for node in cls.body if isinstance(node, ast.FunctionDef)]
    for node in methods:
        if node.name == '__init__' and (rows := parameters(node, comments)):
            yield table(rows, ['parameter', 'type', 'default', 'meaning'])
    for node in methods:
        is_property = any(getattr(d, 'id', '') == 'property' for d in node.decorator_list)
        if node.name.startswith('_'): continue
        if is_property:
            yield f'### {escaped(f"{cls.name}.{node.name}")}\n\n{escaped(ast.get_docstring(node) or "")}\n'
        else:
            yield from described(node, f'{cls.name}.{node.name}', comments, 3)


def module_page(path, name):
    "Everything public in a module."
    text = path.read_text()
    tree, comments = ast.parse(text), comments_of(text)
    parts = [f'---\norphan: true\n---\n\n# {escaped(name)}\n', escaped(ast.get_docstring(tree) or '') + '\n']
    if found := re.search(r'File to edit: (?:\.\./)+(nbs/\S+\.ipynb)', text):
        name = found[1].removeprefix('nbs/')
        parts.append(f'Explained in [{name}](../{found[1]}). [All modules](index.md)\n')
    for node in tree.body:
        if getattr(node, 'name', '_').startswith('_'): continue
        if isinstance(node, ast.ClassDef): parts += described_class(node, comments)
        if isinstance(node, ast.FunctionDef): parts += described(node, node.name, comments, 2)
    return '\n'.join(parts)


def contents(name, path):
    "A line of the contents."
    words = ast.get_docstring(ast.parse(path.read_text())) or ''
    return f'- [{escaped(name)}]({name}.md): {escaped(words)}\n'


def api_pages(root):
    "Name of a page → its text: one page per module, and their contents."
    found, text = {}, '# API\n\nEvery module, with its parameters and what they mean.\n'
    for wing in ORDER:
        paths = sorted(p for p in (root / 'cse' / wing).glob('*.py') if not p.name.startswith('_'))
        names = {'.'.join(['cse', *[wing] * bool(wing), p.stem]): p for p in paths}
        found |= {f'{name}.md': module_page(path, name) for name, path in names.items()}
        text += f'\n## {f"cse.{wing}".rstrip(".")}\n\n' + ''.join(contents(*item) for item in names.items())
    return found | {'index.md': text}
