package usernet

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// table is the nftables table that this driver owns.
const table = "agentiso_user"

// notPublic are the addresses that a guest with internet access has no business
// with: IANA's special-purpose registries, IPv4 and IPv6, as far as they can
// lead to the host or its neighbours. The host's own public addresses are
// covered by the loopback device, over which the kernel sends to itself.
var notPublic = []string{
	"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
	"192.0.0.0/24", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4",
	"::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
}

// script is the whole table as one nft script; nft applies it as one
// transaction, so that there is no moment without it.
func script(o Options, resolvers []netip.Addr) string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	p("table inet %s", table)
	p("delete table inet %s", table)
	p("table inet %s {", table)
	p("  comment \"agentiso: what machines with internet access may not reach\"")
	p("  chain output {")
	p("    type filter hook output priority filter; policy accept;")
	p("    meta skuid %d-%d jump machine", o.UIDBase, o.UIDBase+o.UIDCount-1)
	p("  }")
	p("  chain machine {")
	resolvers = slices.Clone(resolvers)
	slices.SortFunc(resolvers, netip.Addr.Compare)
	for _, r := range slices.Compact(resolvers) {
		p("    %s daddr %s meta l4proto { tcp, udp } th dport 53 accept", family(r), r.Unmap())
	}
	p("    oif lo reject with icmpx admin-prohibited")
	for _, n := range o.AllowPrivate {
		p("    %s daddr %s accept", family(n.Addr()), n.Masked())
	}
	for _, want := range []string{"ip", "ip6"} {
		var all []string
		for _, n := range notPublic {
			if family(netip.MustParsePrefix(n).Addr()) == want {
				all = append(all, n)
			}
		}
		p("    %s daddr { %s } reject with icmpx admin-prohibited", want, strings.Join(all, ", "))
	}
	p("  }")
	p("}")
	return b.String()
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "ip"
	}
	return "ip6"
}
