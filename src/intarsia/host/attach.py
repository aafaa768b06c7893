"""`Attachment`: puts deltas into a live model and takes them out again, bit by bit.

One child per touched module and port; a child is a submodule and owns the module's hook.  Nothing here decides what is
legal: all refusals come before, except those of the model's attention, which only the model itself can give.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from intarsia.errors import SiteError, SpecError
from intarsia.host import attention
from intarsia.host.attention import MemorySocket
from intarsia.host.build import reads_width
from intarsia.host.call import Child, State
from intarsia.host.given import Rung, Watch
from intarsia.host.mirror import Mirror, check_invertible, invertible
from intarsia.host.output import Root
from intarsia.host.record import Entry, Record
from intarsia.host.sequence import DecoderMask, Late, SequenceSocket
from intarsia.host.socket import Slot, Socket, Tap, key_of
from intarsia.host.weights import WeightSocket, slot_key
from intarsia.patches.delta import reads_call
from intarsia.sites.address import Site


class Attachment:
    """What one host has put into a model.

    Args:
        root: the model's root child, None before `attach_root`.
    """

    def __init__(self, model: PreTrainedModel, state: State, record: Record, root: Root | None = None) -> None:
        self.model = model
        self.state = state
        self.record = record
        self.root: Root = root or self.attach_root()

    def child(self, host: nn.Module, key: str, child: Child) -> Any:
        key = f"intarsia{self.state.tag}_{key}"
        child.train(host.training)
        host.add_module(key, child)
        self.record.children.append((host, key))
        return child

    def find(self, host: nn.Module, key: str) -> Any:
        return host._modules.get(f"intarsia{self.state.tag}_{key}")

    def attach_root(self) -> Root:
        """The hooks on the model itself; once per host."""
        model = self.model
        site = self.record.sites["logits"]
        decoder = bool(model.config.is_encoder_decoder)
        try:
            embedding = model.get_input_embeddings()
        except (NotImplementedError, AttributeError):
            embedding = None
        if embedding is not None and not isinstance(getattr(embedding, "weight", None), Tensor):
            embedding = None
        root = self.child(model, "root", Root(self.state, site, embedding, decoder))
        root.__dict__["record"] = self.record
        root.__dict__["checkpointed"] = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self.record.hooks.append(model.register_forward_pre_hook(root.before, with_kwargs=True))
        if decoder:
            stack = model.get_decoder()
        else:
            stack = model.get_submodule(self.record.sites["seq"].path) if "seq" in self.record.sites else model.base_model
        if stack is not None and stack is not model:
            self.record.hooks.append(stack.register_forward_hook(root.note))
        self.record.hooks.append(model.register_forward_hook(root.after, always_call=True))
        return root

    def put(self, name: str, entry: Entry) -> None:
        """Put a module's deltas into sockets; nothing here can be refused any more except by the model's attention."""
        sites = [site for site, _ in entry.built.deltas]
        for site, deltas in entry.built.deltas:
            measured = site.port == "mem" and any(getattr(getattr(part, "spec", None), what, False) for what in ("relative", "shifts") for d in deltas for part in d.modules())
            if measured and ".xattn." not in site.name and not isinstance(self._relative(site), nn.Embedding):
                raise SpecError(f"{site.name} has no table of relative positions as T5's; use the prefix without relative=True or shifts=True")
        head = self.record.sites.get("head")
        width = None if head is None else reads_width(head, self.model.get_submodule(head.path))
        stems = [site for site, deltas in entry.built.deltas if any(invertible(delta) for delta in deltas)]
        for delta in (delta for _, deltas in entry.built.deltas for delta in deltas if invertible(delta)):
            check_invertible(delta, width)
        for site in (s for s, deltas in entry.built.deltas if s.port == "seq" and any(getattr(getattr(d.form, "spec", None), "behind", False) for d in deltas)):
            self._check_late(site)
        if any(site.port == "mem" for site in sites):
            self._route_attention()
        self.record.entries[name] = entry
        if entry.built.shared:
            parts = nn.ModuleDict({key_of(tag): part for tag, part in entry.built.shared.items()})
            self.root.add_module(key_of(name), parts)
        for site, deltas in entry.built.deltas:
            slot = self._slot(site)
            for delta in deltas:
                delta.train(self.model.training)
            slot.put(name, deltas)
        for host, key in self.record.children:
            child = host._modules[key]
            if isinstance(child, Socket | WeightSocket):
                child.refresh()
        for stem in stems:
            self._mirror(head).watch(self._slot(stem))
        asking = [s for s, deltas in entry.built.deltas if s.port != "logits" and any(reads_call(d.form) for d in deltas)]
        for stack in dict.fromkeys(site.stack for site in asking):
            self._watch(stack).names.add(name)
        if any(getattr(d.form, "reads_taps", False) for _, deltas in entry.built.deltas for d in deltas):
            for stack, blocks in self.record.sites.layers.items():
                self._tap_blocks(stack, blocks, name)

    def _mirror(self, head: Site | None) -> Mirror:
        """What undoes in front of the output embedding what invertible modules do at the start of a stack."""
        if self.root.mirror is not None:
            return self.root.mirror
        place = self.model if head is None else self.model.get_submodule(head.path)
        mirror: Mirror = self.child(place, "mirror", Mirror(self.state))
        self.root.__dict__["mirror"] = mirror
        if head is not None:
            self.record.hooks.append(place.register_forward_pre_hook(mirror.before, with_kwargs=True, prepend=True))
        return mirror

    def _tap_blocks(self, stack: str, blocks: int, name: str) -> None:
        """Let the blocks of a stack show a module what they give."""
        watch = self._watch(stack)
        watch.names.add(name)
        watch.tapping.add(name)
        for number in range(blocks):
            block = self.model.get_submodule(self.record.sites[f"{stack}.{number}".lstrip(".")].path)
            if self.find(block, "rung") is None:
                rung = self.child(block, "rung", Rung(self.state, watch))
                if number == 0:
                    self.record.hooks.append(block.register_forward_pre_hook(rung.before, with_kwargs=True))
                # before what changes the block's output
                self.record.hooks.append(block.register_forward_hook(rung.after, prepend=True))

    def _watch(self, stack: str) -> Watch:
        """What notes what a stack is given."""
        if stack == "decoder":
            module = self.model.get_decoder()
        elif stack == "encoder":
            module = self.model.get_encoder()
        else:
            module = self.model.get_submodule(self.record.sites["seq"].path) if "seq" in self.record.sites else self.model.base_model
        watch = self.find(module, "watch")
        if watch is None:
            watch = self.child(module, "watch", Watch(self.state, stack, self.record.sites.layers.get(stack, 0)))
            self.record.hooks.append(module.register_forward_pre_hook(watch.before, with_kwargs=True))
            self.record.hooks.append(module.register_forward_hook(watch.after, always_call=True))
        return watch

    def _relative(self, site: Site) -> nn.Module | None:
        """The table of relative positions of a self-attention: its own, else that of the stack's first block (T5)."""
        stack = "" if not site.stack else f"{site.stack}."
        for layer in (site.layer, 0):
            name = f"{stack}{layer}.attn.relative.weight"
            if site.name == f"{stack}{site.layer}.attn.mem" and name in self.record.sites:
                return self.model.get_submodule(self.record.sites[name].path)
        return None

    def _slot(self, site: Site) -> Slot:
        module = self.model.get_submodule(site.path)
        if site.port == "weight":
            return self._weight_slot(site)
        if site.port == "mem":
            memory = self.find(module, "mem")
            if memory is None:
                memory = self.child(module, "mem", MemorySocket(self.state, site))
                memory.__dict__["number"] = self._number()
                memory.__dict__["table"] = self._relative(site)
                memory.__dict__["tap"] = None if site.reads is None else self._tap(site.reads, memory)
            return memory.slot
        if site.port == "seq":
            return self._sequence_slot(site, module)
        if site.port == "logits":
            return self.root.slot
        socket = self.find(module, site.port)
        if socket is None:
            socket = self.child(module, site.port, Socket(self.state))
            socket.__dict__["number"] = self._number()
            if site.port == "out":
                self.record.hooks.append(module.register_forward_hook(socket.after, with_kwargs=True))
            else:
                self.record.hooks.append(module.register_forward_pre_hook(socket.before, with_kwargs=True))
        for what, path in (("residual", site.residual), ("reads", site.reads)):
            if path is not None and what not in socket.taps:
                socket.taps[what] = self._tap(path, socket)
        if site.norm is not None:
            socket.__dict__["norm"] = self.model.get_submodule(site.norm)
        return socket.slot(site)

    def _number(self) -> int:
        self.record.numbers += 1
        return self.record.numbers

    def _tap(self, path: str, socket: Socket | MemorySocket) -> Tap:
        module = self.model.get_submodule(path)
        tap = self.find(module, "tap")
        if tap is None:
            tap = self.child(module, "tap", Tap(self.state))
            self.record.hooks.append(module.register_forward_pre_hook(tap.before, with_kwargs=True))
        tap.consumers[socket.number] = socket
        return tap

    def _weight_slot(self, site: Site) -> Slot:
        key, slot = slot_key(site), None
        for path, param in site.owners or ((site.path, site.param or "weight"),):
            owner = self.model.get_submodule(path)
            host = self.model.get_submodule(site.lend_at) if site.lend_at is not None else owner
            socket = self.find(host, "weight")
            if socket is None:
                socket = self.child(host, "weight", WeightSocket(self.state))
                self.record.hooks.append(host.register_forward_pre_hook(socket.before, with_kwargs=True))
                # first of all hooks: with per-row expressions it runs the module anew
                after = host.register_forward_hook(socket.after, with_kwargs=True, always_call=True, prepend=True)
                self.record.hooks.append(after)
            if key in socket.slots:
                slot = socket.slots[key]
            else:
                slot = slot or Slot(site)
                socket.adopt(slot, key, owner, param)
        assert slot is not None
        return slot

    def _sequence_slot(self, site: Site, module: nn.Module) -> Slot:
        socket = self.find(module, "seq")
        if socket is None:
            two_stacks = bool(self.model.config.is_encoder_decoder)
            socket = self.child(module, "seq", SequenceSocket(self.state, site, keep=two_stacks))
            self.record.hooks.append(module.register_forward_pre_hook(socket.before, with_kwargs=True, prepend=True))
            if module is self.model:  # a model without a task head: heads must see the mask that the caller gave
                hooks: Any = module._forward_pre_hooks
                hooks.move_to_end(next(k for k, hook in hooks.items() if getattr(hook, "__self__", None) is self.root), last=False)
            norm = self.record.sites.get("embed.norm")
            if norm is not None and not two_stacks:
                late = self.child(self.model.get_submodule(norm.path), "late", Late(self.state, socket))
                self.record.hooks.append(self.model.get_submodule(norm.path).register_forward_hook(late.after))
            # before any hook that reads the stack's output
            self.record.hooks.append(module.register_forward_hook(socket.after, prepend=True))
            if two_stacks:
                decoder = self.model.get_decoder()
                mask = self.child(decoder, "mask", DecoderMask(self.state, socket.names))
                self.record.hooks.append(decoder.register_forward_pre_hook(mask.before, with_kwargs=True))
        return socket.slot

    def _check_late(self, site: Site) -> None:
        norm = self.record.sites.get("embed.norm")
        if norm is None or norm.features != site.features or self.model.config.is_encoder_decoder:
            raise SpecError(f"{site.name}: a prompt behind the norm of the embeddings needs an encoder that normalises them, which {type(self.model).__name__} is not")

    def _route_attention(self) -> None:
        """Let this model's attention run through ours."""
        current = self.model.config._attn_implementation
        if current.startswith(attention.PREFIX):
            return
        if current not in attention.BASES:
            raise SiteError(
                f"prefixes need attn_implementation 'sdpa' or 'eager', {type(self.model).__name__} runs {current!r}; "
                "call model.set_attn_implementation('sdpa') first"
            )
        self.model.set_attn_implementation(attention.PREFIX + current)
        if self.model.config._attn_implementation != attention.PREFIX + current:
            raise SiteError(
                f"{type(self.model).__name__} does not let its attention be replaced, so prefixes cannot reach it; "
                "use a method of another kind (lora, pfeiffer, prompt ...)"
            )
        self.record.implementation = current

    def take(self, name: str) -> None:
        """Take a module's deltas out of all sockets."""
        del self.record.entries[name]
        self.root._modules.pop(key_of(name), None)
        for host, key in self.record.children:
            child = host._modules[key]
            for slot in slots_of(child):
                slot.take(name)
            if isinstance(child, Socket | WeightSocket):
                child.refresh()
            elif isinstance(child, Watch):
                child.forget(name)

    def slots(self) -> list[tuple[Site, Slot]]:
        """Every site with deltas, each once."""
        found: dict[str, tuple[Site, Slot]] = {}
        for host, key in self.record.children:
            for slot in slots_of(host._modules[key]):
                if slot.names:
                    found[slot.site.name] = (slot.site, slot)
        return list(found.values())

    def remove(self) -> None:
        """Take everything out and restore hooks, configuration and, when the last host goes, gradient flags."""
        for handle in self.record.hooks:
            handle.remove()
        self.record.hooks.clear()
        self.root.unpin()
        for host, key in reversed(self.record.children):
            del host._modules[key]
        self.record.children.clear()
        self.record.entries.clear()
        self.state.rest = None
        if self.record.implementation is not None and not any(isinstance(m, MemorySocket) for m in self.model.modules()):
            self.model.set_attn_implementation(self.record.implementation)
        if not any(isinstance(m, Root) for m in self.model.children()):
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(self.record.flags.get(name, parameter.requires_grad))


def slots_of(child: Any) -> list[Slot]:
    """The slots of a child, whatever its kind."""
    if isinstance(child, Socket | WeightSocket):
        return list(child.slots.values())  # type: ignore[arg-type]
    slot = getattr(child, "slot", None)
    return [slot] if isinstance(slot, Slot) else []
