"""The strongly connected components of a directed graph: the sets whose nodes all reach one another."""

from collections.abc import Sequence


def strong_components(followers: Sequence[Sequence[int]]) -> list[int]:
    """Return the number of each node's component; two nodes share one exactly when each reaches the other.

    Takes time and memory in proportion to nodes and edges, and no recursion, so a long chain is no problem.

    Args:
        followers: for each node, numbered from 0, the nodes its edges lead to; repeats are allowed.

    Source: R. Tarjan, Depth-first search and linear graph algorithms (1972), with its own stack.
    """
    num_nodes = len(followers)
    component = [-1] * num_nodes
    found_at = [-1] * num_nodes  # when the search came first to the node
    lowest = [0] * num_nodes  # earliest open node known to be reached from it
    is_open = [False] * num_nodes  # found, and not yet in a component
    open_nodes: list[int] = []
    num_found = num_components = 0
    for root in range(num_nodes):
        if found_at[root] >= 0:
            continue
        path = [(root, 0)]  # nodes being searched, and how many of its edges each has followed
        while path:
            node, num_followed = path.pop()
            if num_followed == 0:
                found_at[node] = lowest[node] = num_found
                num_found += 1
                open_nodes.append(node)
                is_open[node] = True
            else:  # back from the edge followed last
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
