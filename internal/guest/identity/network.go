package identity

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/guest/identity/rtnl"
)

// nic is the machine's network interface, and the loopback beside it.
type nic struct {
	conn *rtnl.Conn
	link rtnl.Link // Index 0: none
	lo   rtnl.Link
}

// openNIC finds the interface: the one called name, or the first Ethernet
// device that is not virtual. It fails, naming the field, if r asks for one and
// there is none, or for a gateway that could not be reached.
func openNIC(name string, r *request) (_ *nic, err error) {
	field := ""
	switch {
	case r.mac != nil:
		field = "mac"
	case r.mtu != 0:
		field = "mtu"
	case r.address.IsValid():
		field = "address"
	case r.gateway.IsValid():
		field = "gateway"
	}
	n := &nic{}
	if n.conn, err = rtnl.Open(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	links, err := n.conn.Links()
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		switch {
		case l.Loopback:
			n.lo = l
		case n.link.Index != 0:
		case name != "" && l.Name == name, name == "" && l.Ethernet && l.Kind == "":
			n.link = l
		}
	}
	if field != "" && n.link.Index == 0 {
		return nil, fieldErrorf(field, "%w: the machine has no network interface", errUnsuitable)
	}
	if r.gateway.IsValid() && !r.address.IsValid() {
		addrs, err := n.conn.Addresses(n.link.Index)
		if err != nil {
			return nil, &FieldError{"gateway", err}
		}
		ok := false
		for _, a := range addrs {
			ok = ok || a.Addr().Is4() == r.gateway.Is4()
		}
		if !ok {
			return nil, fieldErrorf("gateway", "%w: %s has no address of its family", errUnsuitable, n.link.Name)
		}
	}
	return n, nil
}

func (n *nic) close() { _ = n.conn.Close() }

// apply sets what r names. What is as it should be is not touched.
func (n *nic) apply(r *request) error {
	// Previews and many programs need it, with or without a network.
	if n.lo.Index != 0 && !n.lo.Up {
		if err := n.conn.SetUp(n.lo.Index, true); err != nil {
			return &FieldError{"address", fmt.Errorf("loopback: %w", err)}
		}
	}
	changed := false
	if r.mac != nil && !bytes.Equal(n.link.MAC, r.mac) {
		if err := n.setMAC(r.mac); err != nil {
			return &FieldError{"mac", err}
		}
		if err := n.renewLinkLocal(r.mac); err != nil {
			return &FieldError{"mac", err}
		}
		changed = true
	}
	if r.mtu != 0 && n.link.MTU != r.mtu {
		if err := n.conn.SetMTU(n.link.Index, r.mtu); err != nil {
			return &FieldError{"mtu", err}
		}
	}
	if r.address.IsValid() {
		c, err := n.setAddress(r.address)
		if err != nil {
			return &FieldError{"address", err}
		}
		changed = changed || c
	}
	if r.gateway.IsValid() {
		if err := n.setGateway(r.gateway); err != nil {
			return &FieldError{"gateway", err}
		}
	}
	if changed {
		// Learnt under another identity, perhaps on another network.
		if err := n.conn.FlushNeighbours(n.link.Index); err != nil {
			return &FieldError{"address", err}
		}
	}
	return nil
}

// setMAC changes the hardware address, taking the interface down if the driver
// wants that.
func (n *nic) setMAC(mac net.HardwareAddr) error {
	err := n.conn.SetMAC(n.link.Index, mac)
	if errors.Is(err, unix.EBUSY) && n.link.Up {
		return n.setMACDown(mac)
	}
	return err
}

// setMACDown changes the hardware address while the interface is down. The
// kernel drops its routes and IPv6 addresses on the way: they are put back.
func (n *nic) setMACDown(mac net.HardwareAddr) error {
	addrs, err := n.conn.Addresses(n.link.Index)
	if err != nil {
		return err
	}
	var routes []rtnl.Route
	for _, family := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		list, err := n.conn.DefaultRoutes(family)
		if err != nil {
			return err
		}
		routes = append(routes, list...)
	}
	if err := n.conn.SetUp(n.link.Index, false); err != nil {
		return err
	}
	if err := n.conn.SetMAC(n.link.Index, mac); err != nil {
		return errors.Join(err, n.conn.SetUp(n.link.Index, true))
	}
	if err := n.conn.SetUp(n.link.Index, true); err != nil {
		return err
	}
	for _, a := range addrs {
		if err := n.conn.AddAddress(n.link.Index, a); err != nil {
			return err
		}
	}
	for _, rt := range routes {
		if rt.Index == n.link.Index && rt.Gateway.IsValid() {
			if err := n.conn.AddDefaultRoute(n.link.Index, rt.Gateway); err != nil {
				return err
			}
		}
	}
	return nil
}

// renewLinkLocal replaces the IPv6 link-local address that the kernel has made
// of the old hardware address, which siblings have as well.
func (n *nic) renewLinkLocal(mac net.HardwareAddr) error {
	if len(n.link.MAC) != len(mac) {
		return nil
	}
	err := n.conn.DeleteAddress(n.link.Index, linkLocal(n.link.MAC))
	if err != nil {
		// There is none: the interface is down, or has no IPv6.
		return nil
	}
	return n.conn.AddAddress(n.link.Index, linkLocal(mac))
}

// linkLocal is the link-local prefix and modified EUI-64 identifier of a 48 bit
// address, RFC 4291, appendix A.
func linkLocal(mac net.HardwareAddr) netip.Prefix {
	a := [16]byte{0: 0xfe, 1: 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]}
	return netip.PrefixFrom(netip.AddrFrom16(a), 64)
}

// setAddress makes p the interface's only address of its family and brings the
// interface up.
func (n *nic) setAddress(p netip.Prefix) (changed bool, err error) {
	if !n.link.Up {
		if err := n.conn.SetUp(n.link.Index, true); err != nil {
			return false, err
		}
	}
	have, err := n.conn.Addresses(n.link.Index)
	if err != nil {
		return false, err
	}
	found := false
	for _, a := range have {
		switch {
		case a == p:
			found = true
		case a.Addr().Is4() == p.Addr().Is4():
			// Secondary addresses may have gone with their primary one.
			if err := n.conn.DeleteAddress(n.link.Index, a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				return true, err
			}
			changed = true
		}
	}
	if found && !changed {
		return false, nil
	}
	return true, n.conn.AddAddress(n.link.Index, p)
}

// setGateway makes gw the interface's only default route of its family. Those
// that users have made through other interfaces are theirs.
func (n *nic) setGateway(gw netip.Addr) error {
	have, err := n.conn.DefaultRoutes(gw)
	if err != nil {
		return err
	}
	have = slices.DeleteFunc(have, func(rt rtnl.Route) bool { return rt.Index != n.link.Index })
	if len(have) == 1 && have[0].Gateway == gw {
		return nil
	}
	for _, rt := range have {
		if err := n.conn.DeleteRoute(rt); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return n.conn.AddDefaultRoute(n.link.Index, gw)
}
