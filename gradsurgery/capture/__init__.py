"""Rows of a model: gradients of many losses, multiplied and summed without forming large ones.

The words that every file here uses, each for one thing. Where they meet in a pass: docs/capture.md.

The Jacobian

- row: the gradient of one loss, or of the sum of several, over all parameters; -1 marks no row.
- group: the row that sums most samples, as that of a forget batch does, if any sums several. (The
  argument `groups` names the row of each loss.)
- row numbers: the row of each block or loss, with tables made of them once (`RowNumbers`).
- weights: one number a row; the update is the sum of the rows times their weights.

The graph

- place: a node of autograd's graph and the number of one of its outputs, so a tensor.
- column: the index of a parameter among the Jacobian's.
- Function: a torch.autograd.Function that somebody wrote, and of which nothing is known.
- layout: the row that each element of a gradient belongs to (`Layout`), and axis, the dimension it
  depends on, if it is one.
- carrier: how one kind of operation carries a layout from its outputs to its inputs.
- probing, or asking, an operation: calling its own backward for some rows without others.
- leaf: a parameter, or a tensor computed from parameters alone, that rows share.
- recipe: what a walk through a graph read and found, for the next graph that is the same.
- junction: an operation and the input of it where a leaf meets samples.
- unshared: of a parameter, that each of its elements belongs to one row.
- coupled: of samples, that an operation or a hook computes across them, so that rows meet.
- opaque: of an operation, that it cannot be asked, so that nothing is known.
- derived: of leaves, that they are computed from parameters by more than a view; vector-Jacobian
  products lead back (`Derived`).
- bent: of a way back, that it is not linear in the gradient, as where a hook clips.

The pass

- pass: one backward pass of autograd's engine.
- formula: what to keep of a junction of one kind of operation.
- finish: what a formula returns: a function from the gradient of the output to a use.
- fallback: parameters whose rows are got one at a time, and why (`Fallback`).
- snapshot: copies of what Functions keep, to be put back before they are called again.
- hooked: of a node, that it has a hook, of its own or of a tensor that it made.
- partial: of rows, that rows of other passes or ranks are added to them (`PartialRows`).
- watch: what every node took and gave in a pass, to find the hooks that changed it.

What is kept

- use: what one junction kept: n blocks, each a part of one row, most of them not formed.
- pair: the input and the gradient of the output of a layer, from which blocks are formed.
- token: one position of a sample that a pair has a vector for: a word, a patch, a pixel.
- plane: a parameter, or a block of it, seen as a matrix [H, W]: its first dimension by all others.
- line: one of the H vectors of a plane, as that of a word in an embedding's table.
- stack: a parameter that is several matrices, one below the other, each of which meets tokens of
  its own, as experts do: each has a plane of its own (`Stack`).
- kept plane: that of the group's row, formed once: the Gramian and the update need it.
- path: the way to the Gramian of one parameter: "factored", products of tokens; "direct", slices of
  planes that are formed, multiplied and dropped; or rows that are stored anyway.
- together: of planes whose tokens are of one shape, that a GPU multiplies them in one launch.
- sum: rows of what was broadcast that are still to be summed, those of a pass together (`Sum`).
- moment: the sum of x x^T over the inputs x that a parameter multiplies.
"""

from gradsurgery.capture.check import Checked, checked
from gradsurgery.capture.factored import FactoredJacobian
from gradsurgery.capture.fallback import Fallback
from gradsurgery.capture.tape import Tape, tape

__all__ = ["Checked", "FactoredJacobian", "Fallback", "Tape", "checked", "tape"]
