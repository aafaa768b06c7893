"""`Host`: a base model with modules laid into it.

    host = Host(model)
    host.add("ner", lora(rank=8))               a new module, trainable
    host.insert(load("swh.safetensors"))        a stored one, frozen
    with host.using("swh >> ner") as m:         what is active travels with the call
        m(**batch)
    host.extract("ner")                         the module as a value
    host.close()                                the model as it was, bit by bit

The base is frozen while a host is open; `close` restores its flags, hooks, configuration and checkpoint functions.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intarsia.compose import Expr, Ref, Seq, expr, names
from intarsia.compose.legality import Traits, check
from intarsia.errors import CompositionError, ModuleError, SiteError, SpecError, listing
from intarsia.host.attach import Attachment
from intarsia.host.attention import MemorySocket
from intarsia.host.build import Built, build
from intarsia.host.call import CALLS, Call, Note, State, grouped, thread
from intarsia.host.fold import fold, why_not_foldable
from intarsia.host.mirror import FORWARD_ONLY
from intarsia.host.output import Root
from intarsia.host.probe import memories
from intarsia.host.record import Entry, Record
from intarsia.host.routing import covering, members_of
from intarsia.host.transfer import fill, flattened, make_room, whole
from intarsia.methods import ROUTERS, Method
from intarsia.methods.method import HeadSpec, RoutePenalty, side
from intarsia.modules import Card, Module, check_name
from intarsia.patches import Delta, Form
from intarsia.sites.address import Site
from intarsia.sites.anatomy import Anatomy
from intarsia.sites.fingerprint import Fingerprint, fingerprint
from intarsia.sites.resolve import resolve

Expression = Expr | str


class Host:
    """Modules on a frozen model.

    Args:
        model: any transformers model; it is frozen, never changed.
        anatomy: the roles of its parts, for an architecture that is neither known nor inferable.
        tokenizer: if given, it is part of the base's fingerprint.
        base_name: name of the base for cards and messages.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        anatomy: Anatomy | None = None,
        tokenizer: Any = None,
        base_name: str = "",
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise SiteError(f"Host needs a transformers model, found {type(model).__name__}")
        sites = resolve(model, anatomy=anatomy)
        others = [m for m in model.children() if isinstance(m, Root)]
        # flags as they were before the first host; the last one to close restores them
        flags = others[0].record.flags if others else {n: p.requires_grad for n, p in model.named_parameters()}
        state = State(max((o.state.tag for o in others), default=0) + 1)
        if not others:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
        record = Record(sites, flags)
        self._bind(Attachment(model, state, record), tokenizer, base_name)

    def _bind(self, attachment: Attachment, tokenizer: Any, base_name: str) -> None:
        model = attachment.model
        self.model = model
        self.tokenizer = tokenizer
        self.base_name = base_name or str(getattr(model.config, "_name_or_path", "") or "")
        self.sites = attachment.record.sites
        self._attachment = attachment
        self._state = attachment.state
        self._entries = attachment.record.entries
        self._fingerprint: Fingerprint | None = None
        self._lock = threading.RLock()

    @classmethod
    def of(cls, model: PreTrainedModel, *, tokenizer: Any = None, base_name: str = "") -> Host:
        """The host of a model that already carries modules, e.g. a deep or unpickled copy."""
        root = next((m for m in reversed(list(model.children())) if isinstance(m, Root)), None)
        if root is None:
            raise SiteError(f"this {type(model).__name__} carries no modules; make a host with Host(model)")
        host = cls.__new__(cls)
        host._bind(Attachment(model, root.state, root.record, root), tokenizer, base_name)
        return host

    # -- what is here ------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modules on this host."""
        return tuple(self._entries)

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the base (computed once)."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.model, self.tokenizer)
        return self._fingerprint

    def method(self, name: str) -> Method:
        """The method of a module."""
        return self._entry(name).method

    def labels(self, name: str) -> tuple[str, ...] | None:
        """Label names of a module's head, None if it has none."""
        return self._entry(name).labels

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A module's live tensors by their names in its file."""
        return self._entry(name).built.tensors()

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """A module's live parameters by their names in its file."""
        return self._entry(name).built.parameters()

    def make_room(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Let a module's sparse parts take the sizes of other tensors of the same module, before these are copied in."""
        make_room(self._entry(name).built, tensors)

    def deltas(self, name: str) -> list[tuple[Site, list[Delta]]]:
        """A module's deltas by site."""
        return self._entry(name).built.deltas

    def tagged(self, name: str) -> dict[str, dict[str, nn.Parameter]]:
        """A module's parameters by the tag of their patch (`""` for the main group), or by tag and side of their factor
        where the method's policy names that: for learning-rate groups."""
        tags = {p.name: p.tag for p in self.method(name).patches}
        named = {group.tag for group in self.method(name).policy.groups}
        groups: dict[str, dict[str, nn.Parameter]] = {}
        for key, parameter in self.parameters(name).items():
            patch = key.split("/", 1)[1].split(".", 1)[0]
            tag = tags.get(patch, "")
            sided = f"{tag}:{side(key, parameter.dim())}"
            groups.setdefault(sided if sided in named else tag, {})[key] = parameter
        return groups

    def penalty(self, name: str) -> Tensor | None:
        """What a module's method adds to the loss as things stand; None if it adds nothing."""
        built = self._entry(name).built
        parts = [*(delta.form for _, deltas in built.deltas for delta in deltas), *built.shared.values()]
        given = [note for note in self._state.notes.get(thread(), ()) if any(note.owner is part for part in parts)]
        terms = [term.routed(given) if isinstance(term, RoutePenalty) else term.loss(parts) for term in self.method(name).policy.penalties]
        found = [term for term in terms if term is not None]
        return torch.stack(found).sum() if found else None

    def forms(self, name: str) -> dict[str, Form]:
        """A module's forms by `<site>/<patch>`, in model order."""
        return {f"{site.name}/{d.name}": d.form for site, deltas in self.deltas(name) for d in deltas}

    def count(self, method: Method) -> int:
        """Exact number of trainable parameters of a method on this model, built on the meta device."""
        return self._build(method, 0, meta=True).size

    def size(self, name: str) -> int:
        """Number of trainable values that a module on this host has; its rules may have changed what `count` foretold."""
        return self._entry(name).built.size

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            check(Ref(name), self._traits())
        return self._entries[name]

    def _traits(self) -> dict[str, Traits]:
        return {name: entry.traits() for name, entry in self._entries.items()}

    # -- adding and removing -----------------------------------------------------------------------------------------

    def _build(self, method: Method, seed: int, meta: bool = False) -> Built:
        config = self.model.config.get_text_config()
        width = getattr(config, "hidden_size", None) or config.d_model

        def rows() -> Tensor | None:
            module = self._attachment.root.embedding
            return None if module is None else module.weight  # type: ignore[return-value]

        return build(
            method,
            self.sites,
            self.model.get_submodule,
            width=int(width),
            embedding=rows,
            bidirectional=not self.model.config.is_encoder_decoder and not self.model.can_generate() and not _causal(self.model),
            seed=seed,
            meta=meta,
        )

    def add(self, name: str, method: Method, *, seed: int = 0, roles: Mapping[str, str] | None = None) -> Host:
        """A new module of a method, trainable.  Validated before anything is attached."""
        name = self._new_name(name)
        built = self._build(method, seed)
        head = method.head
        entry = Entry(method, built, getattr(head, "labels", None), dict(roles or {}))
        self._put(name, entry)
        try:
            self._start_from_text(entry)
        except Exception:
            self.remove(name)
            raise
        return self

    def router(self, name: str, kind: str, over: Expression | Sequence[Expression], *, seed: int = 0, roles: Mapping[str, str] | None = None,
               head: HeadSpec | None = None, **settings: Any) -> Host:  # fmt: skip
        """A new router of a kind of `ROUTERS`, trainable, for the members of a mixture: `host.router("f", "fusion", ["a", "b"])`.

        Args:
            over: the members, or an expression with one mixture that `name` is the router of.
            head: new outputs that are trained along with it.
            settings: of the kind.
        """
        method = self.router_method(name, kind, over, **settings)
        return self.add(name, method if head is None else method.with_head(head), seed=seed, roles=roles)

    def router_method(self, name: str, kind: str, over: Expression | Sequence[Expression], **settings: Any) -> Method:
        """The method of a router for members that are on this host."""
        row = ROUTERS[kind]
        members = members_of(over, name)
        sites = {site.name: site for member in members for ref in names(member) for site, _ in self.deltas(ref)}
        return row.build(parts=tuple(map(str, members)), where=covering(self.sites, sites.values()), **settings)

    def _start_from_text(self, entry: Entry) -> None:
        """Let prefixes that start from the base's keys and values of a text take these over."""
        waiting: dict[tuple[int, ...], list[tuple[MemorySocket, Any]]] = {}
        for site, deltas in entry.built.deltas:
            for part in (part for delta in deltas for part in delta.form.modules()):
                text = getattr(getattr(part, "spec", None), "text", ())
                if text and hasattr(part, "start_from"):
                    socket = self._attachment.find(self.model.get_submodule(site.path), "mem")
                    waiting.setdefault(text, []).append((socket, part))
        for text, pairs in waiting.items():
            with self.using(None):
                found = memories(self.model, [socket for socket, _ in pairs], text)
            for (_, part), (keys, values) in zip(pairs, found):
                part.start_from(keys, values)

    def insert(self, module: Module, *, name: str | None = None, force_base: bool = False) -> Host:
        """A stored module, frozen.

        Raises:
            ModuleError: it belongs to another base (the field that differs is named), or its tensors are not those its
                method has on this model (missing, extra and misshapen ones are counted and named).
        """
        name = self._new_name(name or module.name)
        difference = module.base.difference(self.fingerprint)
        if difference and not force_base:
            raise ModuleError(
                f"module {module.name!r} belongs to another base: {difference}. Use the base it was trained on, or "
                "force_base=True (--force-base) if you know that the weights are close enough"
            )
        built = self._build(module.method, 0)
        fill(built, module)
        entry = Entry(
            module.method, built, module.labels, dict(module.roles), module.requires, dict(module.context), module.card
        )  # plain dictionaries: the record is deep-copied and pickled with the model, which a read-only view cannot be
        self._put(name, entry)
        for parameter in built.parameters().values():
            parameter.requires_grad_(False)
        return self

    def _put(self, name: str, entry: Entry) -> None:
        if self._fingerprint is None and not any(p.is_meta for p in self.model.parameters()):
            self._fingerprint = fingerprint(self.model, self.tokenizer)  # now: later the base may be sharded
        self._attachment.put(name, entry)

    def _new_name(self, name: str) -> str:
        name = check_name(name)
        if name in self._entries:
            raise ModuleError(f"a module {name!r} is already on this host; remove it first or take another name")
        return name

    def describe(
        self,
        name: str,
        *,
        context: Mapping[str, Any] | None = None,
        requires: tuple[str, ...] | None = None,
        card: Card | None = None,
    ) -> Host:
        """Say more of a module on this host; what is left out stays.  `extract` writes it into the value."""
        entry = self._entry(name)
        entry.context = entry.context if context is None else dict(context)
        entry.requires = entry.requires if requires is None else tuple(requires)
        entry.card = card or entry.card
        return self

    def remove(self, name: str) -> Host:
        """Take a module off this host; the others stay."""
        self._entry(name)
        if self._state.rest is not None and name in self._state.rest.names:
            raise CompositionError(f"module {name!r} is part of the resting expression; host.rest(None) first")
        self._attachment.take(name)
        return self

    def extract(self, name: str, *, flatten: bool = False, **context: Any) -> Module:
        """The module as a value.

        Args:
            flatten: give reparametrised parts in their plain form (equal outputs, fewer tensors).
            context: what a call would say, where the plain form depends on it (`task=` for generated parts).
        """
        entry = self._entry(name)
        method, tensors = entry.method, entry.built.tensors()
        if context and not flatten:
            raise SpecError(f"{', '.join(context)}= chooses the plain form of a module: extract({name!r}, flatten=True, ...)")
        if flatten:
            method, tensors = flattened(entry, context)
            kept = self._build(method, 0, meta=True).tensors()  # parts tied to forms that are gone are gone too
            tensors = {k: t for k, t in tensors.items() if k in kept}
        return Module(
            name=name,
            method=method,
            tensors={k: whole(t) for k, t in tensors.items()},
            base=self.fingerprint,
            labels=entry.labels,
            roles=dict(entry.roles),
            requires=entry.requires,
            context=dict(entry.context),
            card=entry.card or Card(base=self.base_name, method=method.name),
        )

    def trainable(self, *names: str) -> Host:
        """Make exactly these modules trainable."""
        for name in names:
            self._entry(name)
        for name, entry in self._entries.items():
            for parameter in entry.built.parameters().values():
                parameter.requires_grad_(name in names)
        return self

    # -- calling -----------------------------------------------------------------------------------------------------

    def call(
        self,
        expression: Expression | Sequence[Expression] | None,
        *,
        head: str | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> Call:
        """A checked call: one expression, or a sequence with one per row of the batch."""
        known = self._traits()
        unembeds = "head" in self.sites and not (context or {}).get(FORWARD_ONLY)
        if expression is None or isinstance(expression, Expr | str):
            one = expr_of(expression)
            check(one, known, head, unembeds)
            weighing = [w for name in names(one) if (w := known[name].weighs) is not None and w.parameters]
            rows = grouped(context or {}, frozenset().union(*(w.keys for w in weighing)))
            return Call.of((one,) * (1 if rows is None else max(rows) + 1), rows, head, context)
        if not expression:
            raise CompositionError("per-row expressions: the sequence is empty")
        given = [expr_of(e) for e in expression]
        distinct = list(dict.fromkeys(given))
        for e in distinct:
            check(e, known, head, unembeds)
        return Call.of(tuple(distinct), tuple(distinct.index(e) for e in given), head, context)

    @contextlib.contextmanager
    def using(
        self, expression: Expression | Sequence[Expression] | None, *, head: str | None = None, **context: Any
    ) -> Iterator[PreTrainedModel]:
        """Run the model with an expression: in this block and this thread only.

        Args:
            expression: an expression or its text; None or `"base"` for the bare base; a sequence gives one per row.
            head: name of the module whose head answers, where an expression has several.
            context: anything forms may ask for.
        """
        call = self.call(expression, head=head, context=context)
        watched = self._state.watched.get(thread())
        if watched is not None or (torch.is_grad_enabled() and self._penalised(call)):
            notes: list[Note] = [] if watched is None else watched
            call = replace(call, notes=notes)
            self._state.notes[thread()] = notes
        else:
            self._state.notes.pop(thread(), None)
        token = CALLS.set({**CALLS.get(), self._state: call})
        try:
            yield self.model
        finally:
            CALLS.reset(token)
            self._state.left.pop(thread(), None)

    def _penalised(self, call: Call) -> bool:
        """Whether a router of a call has a penalty on the weights it gives."""
        return any(isinstance(term, RoutePenalty) for name in call.names for term in self._entries[name].method.policy.penalties)

    def rest(self, expression: Expression | Sequence[Expression] | None, *, head: str | None = None) -> Host:
        """The expression that is active where no `using` says otherwise; None for the bare base."""
        self._state.rest = None if expression is None else self.call(expression, head=head)
        return self

    def compile(self, **options: Any) -> Callable[..., Any]:
        """A compiled forward: `run(expression, **inputs)`.

        A compiled graph cannot read a ContextVar, so the expression is put to rest for the duration of the call, under
        a lock.  Each distinct expression is compiled once.
        """
        compiled = torch.compile(self.model, **options)

        def run(expression: Expression | None, *args: Any, **kwargs: Any) -> Any:
            call = self.call(expression)
            with self._lock:
                before, self._state.rest = self._state.rest, call
                try:
                    return compiled(*args, **kwargs)
                finally:
                    self._state.rest = before

        return run

    def why_not_foldable(self, expression: Expression) -> str | None:
        """The first reason why an expression cannot be folded into the base's weights, None if it can."""
        one = self.call(expression).exprs[0]
        return why_not_foldable(one, self._attachment.slots(), self.sites, self.model.get_submodule)

    def fold(self, expression: Expression, *, drop_head: bool = False) -> PreTrainedModel:
        """A copy of the base with the change inside: a plain transformers model without hooks.

        Args:
            drop_head: a head is new output and no part of the base; leave it out (otherwise it is refused).

        Raises:
            CompositionError: a part of the expression has no folded form; the reason is given.
        """
        one = self.call(expression).exprs[0]
        headed = [n for n in sorted(names(one)) if self._entries[n].method.head is not None]
        if headed and not drop_head:
            raise CompositionError(
                f"module {headed[0]!r} has a head, which is not a change of any base weight; fold with drop_head=True and "
                "keep the head as a module"
            )
        slots = [(s, slot) for s, slot in self._attachment.slots() if s.port != "logits"]
        reason = why_not_foldable(one, slots, self.sites, self.model.get_submodule)
        if reason:
            raise CompositionError(f"{one} cannot be folded: {reason}")
        bare = copy.deepcopy(self.model)
        Host.of(bare).close()
        return fold(bare, one, slots, self.sites, self.model.get_submodule)

    # -- leaving -----------------------------------------------------------------------------------------------------

    def close(self) -> PreTrainedModel:
        """Remove everything this host put into the model and give the model back as it was."""
        self._attachment.remove()
        return self.model

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Host({type(self.model).__name__}, modules: {listing(self.names) or 'none'})"


def expr_of(value: Expression | None) -> Expr:
    """An expression; None is the base."""
    return Seq(()) if value is None else expr(value)


def _causal(model: PreTrainedModel) -> bool:
    """Whether the model's attention looks back only (a decoder without its head cannot `generate`)."""
    return any(getattr(m, "is_causal", False) for m in model.modules())
