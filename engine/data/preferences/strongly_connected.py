"""The strongly connected components of a directed graph: sets of nodes that all reach one another."""

from collections.abc import Sequence


def strong_components(followers: Sequence[Sequence[int]]) -> list[int]:
    """Return the component number of each node; two nodes share a component if each reaches the other.

    Time and memory are linear in nodes and edges. There is no recursion, so chains may be long.

    Args:
        followers: for each node, numbered from 0, the nodes that its edges lead to; repeats are allowed.

    Source: R. Tarjan, Depth-first search and linear graph algorithms (1972), with an explicit stack.
    """
    num_nodes = len(followers)
    component = [-1] * num_nodes
    found_at = [-1] * num_nodes  # order of discovery
    lowest = [0] * num_nodes  # earliest open node known to be reachable from the node
    is_open = [False] * num_nodes  # discovered, and not yet in a component
    open_nodes: list[int] = []
    num_found = num_components = 0
    for root in range(num_nodes):
        if found_at[root] >= 0:
            continue
        path = [(root, 0)]  # nodes being searched, and the number of edges followed from each
        while path:
            node, num_followed = path.pop()
            if num_followed == 0:
                found_at[node] = lowest[node] = num_found
                num_found += 1
                open_nodes.append(node)
                is_open[node] = True
            else:  # returned from the edge followed last
                child = followers[node][num_followed - 1]
                if is_open[child]:
                    lowest[node] = min(lowest[node], lowest[child])
            if num_followed < len(followers[node]):
                path.append((node, num_followed + 1))
                child = followers[node][num_followed]
                if found_at[child] < 0:
                    path.append((child, 0))
                continue
            if lowest[node] == found_at[node]:
                while is_open[node]:
                    member = open_nodes.pop()
                    is_open[member] = False
                    component[member] = num_components
                num_components += 1
    return component
