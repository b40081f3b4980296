package usernet

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

var update = flag.Bool("update", false, "rewrite golden files")

var equal = cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{})

// fakeNFT stands in for the host's table.
type fakeNFT struct {
	script string
	err    error
}

func (f *fakeNFT) run(_ context.Context, s string) error {
	if f.err != nil {
		return f.err
	}
	f.script = s
	return nil
}

func newDriver(t *testing.T, opt Options) (*Driver, *fakeNFT) {
	t.Helper()
	if opt.ResolvConf == "" {
		opt.ResolvConf = filepath.Join(t.TempDir(), "resolv.conf")
		if err := os.WriteFile(opt.ResolvConf, []byte("# by hand\nsearch example\nnameserver 127.0.0.53\nnameserver fe80::1%eth0\n nameserver 10.1.1.1 \nnameserver 10.1.1.2\nnameserver\nnameserver x\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d, err := New(opt)
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeNFT{}
	d.nft = f.run
	return d, f
}

var guarded = Options{UIDBase: 1_900_000_000, UIDCount: 65536}

func TestAttach(t *testing.T) {
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	const mac = "02:11:22:33:44:55"
	tests := []struct {
		name   string
		opt    Options
		policy domain.NetworkPolicy
		prev   domain.NetworkSlot
		want   domain.NetworkSlot // MAC is checked apart where prev has none
		table  bool
	}{
		{"nothing allowed", guarded, domain.NetworkPolicy{}, domain.NetworkSlot{MAC: mac},
			domain.NetworkSlot{Driver: "user", MAC: mac, Address: prefix("10.0.2.15/24"), Restrict: true}, false},
		{"internet", guarded, domain.NetworkPolicy{AllowInternet: true}, domain.NetworkSlot{MAC: mac},
			domain.NetworkSlot{Driver: "user", MAC: mac, Address: prefix("10.0.2.15/24"), Gateway: addr("10.0.2.2"), DNS: []netip.Addr{addr("10.0.2.3")}}, true},
		{"internet without users", Options{}, domain.NetworkPolicy{AllowInternet: true}, domain.NetworkSlot{MAC: mac},
			domain.NetworkSlot{Driver: "user", MAC: mac, Address: prefix("10.0.2.15/24"), Gateway: addr("10.0.2.2"), DNS: []netip.Addr{addr("10.0.2.3")}}, false},
		{"own network and name servers", Options{Subnet: prefix("172.30.4.32/27"), DNS: []netip.Addr{addr("9.9.9.9")}},
			domain.NetworkPolicy{AllowInternet: true}, domain.NetworkSlot{MAC: mac},
			domain.NetworkSlot{Driver: "user", MAC: mac, Address: prefix("172.30.4.47/27"), Gateway: addr("172.30.4.34"), DNS: []netip.Addr{addr("9.9.9.9")}}, false},
		{"keeps its address", Options{Subnet: prefix("192.168.0.0/16")}, domain.NetworkPolicy{},
			domain.NetworkSlot{Driver: "user", MAC: mac, Address: prefix("10.0.2.15/24")},
			domain.NetworkSlot{Driver: "user", MAC: mac, Address: prefix("10.0.2.15/24"), Restrict: true}, false},
		{"was on a bridge", Options{}, domain.NetworkPolicy{},
			domain.NetworkSlot{Driver: "bridge", MAC: mac, Address: prefix("10.99.3.4/16"), TAP: "tap0"},
			domain.NetworkSlot{Driver: "user", MAC: mac, Address: prefix("10.0.2.15/24"), Restrict: true}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d, nft := newDriver(t, tt.opt)
			got, err := d.Attach(t.Context(), "w1", tt.policy, tt.prev)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, equal); diff != "" {
				t.Errorf("slot (-want +got):\n%s", diff)
			}
			if (nft.script != "") != tt.table {
				t.Errorf("table written: %v, want %v", nft.script != "", tt.table)
			}
			again, err := d.Attach(t.Context(), "w1", tt.policy, got)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(got, again, equal); diff != "" {
				t.Errorf("second slot (-first +second):\n%s", diff)
			}
			if err := d.Detach(t.Context(), "w1", got); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestMAC(t *testing.T) {
	d, _ := newDriver(t, Options{})
	seen := map[string]bool{}
	for _, prev := range []string{"", "rubbish", "ff:ff:ff:ff:ff:ff", "00:11:22:33:44:55", "03:11:22:33:44:55", "02:11:22:33:44:55:66:77"} {
		for range 50 {
			s, err := d.Attach(t.Context(), "w", domain.NetworkPolicy{}, domain.NetworkSlot{MAC: prev})
			if err != nil {
				t.Fatal(err)
			}
			m := s.HardwareAddr()
			if len(m) != 6 || m[0]&3 != 2 || s.MAC == prev || seen[s.MAC] {
				t.Errorf("MAC %q after %q", s.MAC, prev)
			}
			seen[s.MAC] = true
		}
	}
}

// TestFailsClosed: without the table there is no internet.
func TestFailsClosed(t *testing.T) {
	for name, err := range map[string]error{
		"no nft":    fmt.Errorf("nft: %w", exec.ErrNotFound),
		"no rights": errors.New("nft: Operation not permitted"),
	} {
		d, nft := newDriver(t, guarded)
		nft.err = err
		_, aerr := d.Attach(t.Context(), "w1", domain.NetworkPolicy{AllowInternet: true}, domain.NetworkSlot{})
		if f := fault.As(aerr); f.Kind != fault.Missing || f.Next == "" {
			t.Errorf("%s: Attach: %v (next: %s)", name, aerr, f.Next)
		}
		if _, err := d.Attach(t.Context(), "w1", domain.NetworkPolicy{}, domain.NetworkSlot{}); err != nil {
			t.Errorf("%s: Attach without internet: %v", name, err)
		}
	}
	d, nft := newDriver(t, guarded)
	nft.err = fmt.Errorf("nft: %w", exec.ErrNotFound)
	if err := d.Remove(t.Context()); err != nil {
		t.Errorf("Remove without nft: %v", err)
	}
}

func TestScript(t *testing.T) {
	opt := guarded
	opt.AllowPrivate = []netip.Prefix{netip.MustParsePrefix("192.168.5.0/24"), netip.MustParsePrefix("fd00:1::/32")}
	opt.DNS = []netip.Addr{netip.MustParseAddr("10.1.1.1")}
	d, nft := newDriver(t, opt)
	if _, err := d.Attach(t.Context(), "w1", domain.NetworkPolicy{AllowInternet: true}, domain.NetworkSlot{}); err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "guard.nft")
	if *update {
		if err := os.WriteFile(golden, []byte(nft.script), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), nft.script); diff != "" {
		t.Errorf("script (-want +got):\n%s", diff)
	}
}

func TestNewRefuses(t *testing.T) {
	for _, s := range []string{"10.0.2.0/28", "10.0.2.1/24", "fd00::/64", "0.0.0.0/0"} {
		if _, err := New(Options{Subnet: netip.MustParsePrefix(s)}); !fault.Is(err, fault.Invalid) {
			t.Errorf("subnet %s: %v", s, err)
		}
	}
}

func TestNoResolvConf(t *testing.T) {
	d, nft := newDriver(t, Options{UIDBase: 5000, UIDCount: 1, ResolvConf: filepath.Join(t.TempDir(), "none")})
	if _, err := d.Attach(t.Context(), "w1", domain.NetworkPolicy{AllowInternet: true}, domain.NetworkSlot{}); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(nft.script, "dport 53") {
		t.Error("name servers from nowhere")
	}
}
