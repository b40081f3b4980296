package rtnl

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Link is a network interface.
type Link struct {
	Index    int
	Name     string
	MAC      net.HardwareAddr // nil when it has none
	MTU      uint32
	Up       bool
	Loopback bool
	Ethernet bool
	// Kind is the driver of a virtual interface ("veth", "bridge", "dummy");
	// "" for a device.
	Kind string
}

// Links returns all interfaces.
func (c *Conn) Links() ([]Link, error) {
	list, err := c.dump(unix.RTM_GETLINK, make([]byte, unix.SizeofIfInfomsg))
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var links []Link
	for _, m := range list {
		if l, ok := parseLink(m); ok {
			links = append(links, l)
		}
	}
	return links, nil
}

func parseLink(m message) (l Link, ok bool) {
	if m.kind != unix.RTM_NEWLINK || len(m.data) < unix.SizeofIfInfomsg {
		return l, false
	}
	hw := binary.NativeEndian.Uint16(m.data[2:])
	flags := binary.NativeEndian.Uint32(m.data[8:])
	l.Index = int(int32(binary.NativeEndian.Uint32(m.data[4:])))
	l.Up = flags&unix.IFF_UP != 0
	l.Loopback = flags&unix.IFF_LOOPBACK != 0
	l.Ethernet = hw == unix.ARPHRD_ETHER
	for typ, v := range attributes(m.data[unix.SizeofIfInfomsg:]) {
		switch typ {
		case unix.IFLA_IFNAME:
			l.Name = text(v)
		case unix.IFLA_ADDRESS:
			l.MAC = bytes.Clone(v)
		case unix.IFLA_MTU:
			if len(v) >= 4 {
				l.MTU = binary.NativeEndian.Uint32(v)
			}
		case unix.IFLA_LINKINFO:
			for typ, v := range attributes(v) {
				if typ == unix.IFLA_INFO_KIND {
					l.Kind = text(v)
				}
			}
		}
	}
	return l, l.Index > 0
}

// SetMAC sets the hardware address. Most drivers want the interface down; the
// error is then EBUSY.
func (c *Conn) SetMAC(index int, mac net.HardwareAddr) error {
	if err := c.do(unix.RTM_NEWLINK, 0, attribute(linkBody(index, 0, 0), unix.IFLA_ADDRESS, mac)); err != nil {
		return fmt.Errorf("set hardware address: %w", err)
	}
	return nil
}

// SetMTU sets the MTU.
func (c *Conn) SetMTU(index int, mtu uint32) error {
	if err := c.do(unix.RTM_NEWLINK, 0, attribute32(linkBody(index, 0, 0), unix.IFLA_MTU, mtu)); err != nil {
		return fmt.Errorf("set MTU: %w", err)
	}
	return nil
}

// SetUp brings the interface up or down.
func (c *Conn) SetUp(index int, up bool) error {
	var flags uint32
	if up {
		flags = unix.IFF_UP
	}
	if err := c.do(unix.RTM_NEWLINK, 0, linkBody(index, flags, unix.IFF_UP)); err != nil {
		return fmt.Errorf("bring interface up: %w", err)
	}
	return nil
}

func linkBody(index int, flags, change uint32) []byte {
	b := make([]byte, 4, unix.SizeofIfInfomsg)
	b = binary.NativeEndian.AppendUint32(b, uint32(index))
	b = binary.NativeEndian.AppendUint32(b, flags)
	return binary.NativeEndian.AppendUint32(b, change)
}

// Addresses returns the interface's addresses, but for link-local ones of IPv6,
// which the kernel makes itself.
func (c *Conn) Addresses(index int) ([]netip.Prefix, error) {
	list, err := c.dump(unix.RTM_GETADDR, make([]byte, unix.SizeofIfAddrmsg))
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var addrs []netip.Prefix
	for _, m := range list {
		i, p, ok := parseAddress(m)
		if ok && i == index && !(p.Addr().Is6() && p.Addr().IsLinkLocalUnicast()) {
			addrs = append(addrs, p)
		}
	}
	return addrs, nil
}

func parseAddress(m message) (index int, p netip.Prefix, ok bool) {
	if m.kind != unix.RTM_NEWADDR || len(m.data) < unix.SizeofIfAddrmsg {
		return 0, p, false
	}
	var addr netip.Addr
	local := false
	for typ, v := range attributes(m.data[unix.SizeofIfAddrmsg:]) {
		// On a point-to-point interface ADDRESS is the peer's.
		if typ == unix.IFA_LOCAL || typ == unix.IFA_ADDRESS && !local {
			local = typ == unix.IFA_LOCAL
			addr, ok = netip.AddrFromSlice(v)
		}
	}
	p = netip.PrefixFrom(addr, int(m.data[1]))
	return int(int32(binary.NativeEndian.Uint32(m.data[4:]))), p, ok && p.IsValid()
}

// AddAddress adds p to the interface. It is usable at once: duplicate address
// detection is left out, the host hands out addresses once.
func (c *Conn) AddAddress(index int, p netip.Prefix) error {
	b := addressBody(index, p)
	if p.Addr().Is4() {
		b = attribute(b, unix.IFA_BROADCAST, broadcast(p).AsSlice())
	} else {
		b = attribute32(b, unix.IFA_FLAGS, unix.IFA_F_NODAD)
	}
	if err := c.do(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, b); err != nil {
		return fmt.Errorf("add address %v: %w", p, err)
	}
	return nil
}

// DeleteAddress removes p from the interface.
func (c *Conn) DeleteAddress(index int, p netip.Prefix) error {
	if err := c.do(unix.RTM_DELADDR, 0, addressBody(index, p)); err != nil {
		return fmt.Errorf("remove address %v: %w", p, err)
	}
	return nil
}

func addressBody(index int, p netip.Prefix) []byte {
	b := []byte{family(p.Addr()), byte(p.Bits()), 0, unix.RT_SCOPE_UNIVERSE}
	b = binary.NativeEndian.AppendUint32(b, uint32(index))
	b = attribute(b, unix.IFA_LOCAL, p.Addr().AsSlice())
	return attribute(b, unix.IFA_ADDRESS, p.Addr().AsSlice())
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// broadcast is the last address of an IPv4 prefix.
func broadcast(p netip.Prefix) netip.Addr {
	a := p.Addr().As4()
	n := binary.BigEndian.Uint32(a[:]) | uint32(1<<(32-p.Bits())-1)
	binary.BigEndian.PutUint32(a[:], n)
	return netip.AddrFrom4(a)
}
